"""Compressed activations on a GPU: the kernel that casts, the error of gradients, memory, and no waiting."""

from __future__ import annotations

import pytest
import torch
from no_waiting import no_waiting
from torch import nn

from deepseek_mp.activations import ActivationSettings, compressed_activations
from deepseek_mp.activations.compress import rounded

pytestmark = pytest.mark.gpu


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.LayerNorm(1024), nn.Linear(1024, 1024), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)]
    return nn.Sequential(*layers).cuda()


def gradients(net, x, settings) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with torch.autocast("cuda", torch.bfloat16):
        if settings is None:
            loss = net(x).float().square().mean()
        else:
            with compressed_activations(net, settings):
                loss = net(x).float().square().mean()
    return list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize(("rounding", "bound"), [("nearest", 2e-3), ("stochastic", 4e-3)])
@pytest.mark.parametrize("group", [32, 128])
def test_gradients_have_the_error_of_the_format(rounding, bound, group):
    net, x = model(), torch.randn(4096, 1024, device="cuda", requires_grad=True)
    exact = gradients(net, x, None)
    found = gradients(net, x, ActivationSettings(rounding=rounding, group=group))
    lost = sum((a - b).square().sum() for a, b in zip(found, exact, strict=True))
    assert 0 < float(lost / sum(b.square().sum() for b in exact)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_a_cpu(dtype):
    x = torch.randn(1000, 129, dtype=dtype)
    for seed in (None, 7):
        assert torch.equal(rounded(x.cuda(), 128, seed).restore().cpu(), rounded(x, 128, seed).restore())


def test_a_forward_leaves_less_memory():
    net, x = model(), torch.randn(8192, 1024, device="cuda", requires_grad=True)
    left = []
    for settings in (ActivationSettings(min_bytes=1 << 40), ActivationSettings()):
        before = torch.cuda.memory_allocated()
        with compressed_activations(net, settings) as saved:
            loss = net(x).square().mean()
        left.append((torch.cuda.memory_allocated() - before, saved.record().bytes_after))
        del loss
    assert left[1][0] < 0.45 * left[0][0]
    assert left[1][0] == pytest.approx(left[1][1], rel=0.1)


def test_nothing_waits():
    net, x = model(), torch.randn(4096, 1024, device="cuda", requires_grad=True)
    gradients(net, x, ActivationSettings())  # compiles the kernel
    with no_waiting():
        gradients(net, x, ActivationSettings())


def test_pairs_are_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3)).cuda()
    with compressed_activations(net, ActivationSettings(min_bytes=1, recompute_norm_relu=True)) as saved:
        net(torch.randn(16, 3, 32, 32, device="cuda"))
    assert [(p.recomputed, p.reason) for p in saved.record().pairs] == [(False, "equal sums are not proven on cuda")]
