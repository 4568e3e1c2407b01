"""The norm of a step's gradients has PyTorch's bits, and what was taken early is not believed after a write."""

import pytest
import torch
from torch.nn.utils import get_total_norm

from deepseek_mp.optim.offload.crew import Crew
from deepseek_mp.optim.offload.grad_norm import SAMPLES, Landed, total_norm


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_total_norm_is_pytorchs_to_the_bit(threads, dtype):
    grads = [torch.randn(size, dtype=dtype) for size in (100_003, 7, 1, 5000)]
    assert torch.equal(total_norm(grads, Crew(threads)), get_total_norm(grads))


def test_a_number_that_is_not_finite_shows():
    grads = [torch.randn(50), torch.tensor([1.0, float("nan")])]
    assert not total_norm(grads, Crew(2)).isfinite()


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
