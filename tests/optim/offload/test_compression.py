"""Compression on the host and on a fake NPU, which is simulated and says so."""

import pytest
import torch
from fake_device import small_model
from simulated_npu import HOST, SimulatedNpu
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload.compression import compressed_activations, fastest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 128), (7, 300), ()])
def test_values_come_back_within_e4m3s_half_step(dtype, shape):
    tensor = (torch.randn(shape) * torch.exp(4 * torch.randn(shape))).to(dtype)
    back = HOST.expand(HOST.compress(tensor))
    assert (back.shape, back.dtype) == (tensor.shape, dtype)
    flat = nn.functional.pad(tensor.float().reshape(-1), (0, -tensor.numel() % 128)).view(-1, 128)
    smallest_step = (flat.abs().amax(1, keepdim=True) / 448 * 2**-9).expand_as(flat).reshape(-1)[: tensor.numel()]
    allowed = tensor.float().abs() / 16 * 1.05 + smallest_step.view(shape)
    assert bool(((back.float() - tensor.float()).abs() <= allowed).all())


def test_takes_a_quarter_of_fp32_and_keeps_zeros_and_bad_numbers():
    tensor = torch.randn(64, 128)
    assert HOST.compress(tensor).nbytes < 0.27 * tensor.nbytes
    assert torch.equal(HOST.expand(HOST.compress(torch.zeros(300))), torch.zeros(300))
    bad = torch.ones(256)
    bad[3] = float("nan")
    back = HOST.expand(HOST.compress(bad))
    assert back[3].isnan()
    assert torch.equal(back[128:], torch.ones(128))
    bad[3] = float("inf")
    assert not HOST.expand(HOST.compress(bad))[3].isfinite()


@pytest.mark.parametrize("value", [1e-45, 1e-44, 1e-42, 1e-38, 3.4e38])
def test_finite_values_stay_finite_at_both_ends_of_the_range(value):
    """A group of tiny gradients must not skip the step."""
    assert HOST.expand(HOST.compress(torch.full((300,), value))).isfinite().all()


def test_the_faster_place_is_taken():
    npu = SimulatedNpu()
    assert fastest([HOST, npu], 1000) is HOST
    assert fastest([HOST, npu], 10**9) is npu
    assert npu.simulated
    assert not HOST.simulated
    with pytest.raises(ConfigError, match="no placements"):
        fastest([], 1)


def test_activations_are_compressed_and_gradients_nearly_the_same():
    exact, other = small_model(), small_model()
    batch = torch.randn(512, 19)
    exact(batch).square().mean().backward()
    npu = SimulatedNpu()
    with compressed_activations(npu, keep=list(other.parameters())):
        loss = other(batch).square().mean()
    packed = len(npu.calls)
    assert packed >= 3
    loss.backward()
    assert npu.calls[packed:] == ["expand"] * packed
    both = list(zip(exact.parameters(), other.parameters(), strict=True))
    differences = [float((theirs.grad - own.grad).norm() / theirs.grad.norm()) for theirs, own in both]
    assert 0 < max(differences) < 0.1


def test_weights_and_small_tensors_are_saved_as_they_are():
    layer = nn.Linear(128, 128)
    npu = SimulatedNpu()
    with compressed_activations(npu, keep=list(layer.parameters())):
        layer(torch.randn(2, 128, requires_grad=True)).sum().backward()
    assert npu.calls == []
