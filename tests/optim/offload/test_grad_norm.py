"""The norm of a step's gradients has PyTorch's bits, and what was taken early is not believed after a write."""

import pytest
import torch
from torch.nn.utils import get_total_norm

from deepseek_mp.optim.offload import grad_norm
from deepseek_mp.optim.offload.grad_norm import SAMPLES, Landed, norms_of, total_norm


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_total_norm_is_pytorchs_to_the_bit(threads, dtype):
    grads = [torch.randn(size, dtype=dtype) for size in (100_003, 7, 1, 5000)]
    assert torch.equal(total_norm(grads, threads), get_total_norm(grads))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("values", [1, 7, grad_norm.LEAST, grad_norm.LEAST + 5])
def test_norms_of_parts_are_those_of_all(values, threads):
    gradient = torch.randn(values)
    gradient[-1] = 1000.0
    parts = norms_of(gradient, threads)
    assert parts.dim() == 1
    assert torch.allclose(parts.norm(), gradient.norm())
    shared = threads > 1 and values >= grad_norm.LEAST
    assert len(parts) == (threads + bool(values % threads) if shared else 1)


def test_a_number_that_is_not_finite_shows():
    grads = [torch.randn(50), torch.tensor([1.0, float("nan")])]
    assert not total_norm(grads, 2).isfinite()


@pytest.mark.parametrize("values", [1, SAMPLES, 1000])
def test_a_gradient_is_as_it_landed_until_it_is_written(values):
    gradient = torch.randn(values)
    landed = Landed.of(gradient, [gradient.norm()])
    assert landed.still(gradient)
    assert not landed.still(gradient.clone())
    gradient.data.mul_(2.0)
    assert not landed.still(gradient)
    landed = Landed.of(gradient, [gradient.norm()])
    gradient[-1] = gradient[-1].clone()
    assert not landed.still(gradient)
