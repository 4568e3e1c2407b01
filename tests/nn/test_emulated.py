"""Emulated FP8 convolutions: rounded operands in all three products, and only where emulation was agreed to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp import autocast
from deepseek_mp.nn import apply, revert
from deepseek_mp.nn.emulated import can_be_emulated, rounded
from deepseek_mp.nn.functional import Cast
from deepseek_mp.precision import RECIPES, PrecisionPlan, Reason

E4M3, E5M2 = Cast("fp8_e4m3", "tensor", False), Cast("fp8_e5m2", "tensor", False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 4)
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("cast", "error"), [(E4M3, 0.0265), (E5M2, 0.053)])
def test_rounding_has_the_error_of_the_format(cast: Cast, error: float) -> None:
    x = torch.randn(7, 5, 33, 9)
    assert 0.9 * error < relative(rounded(x, cast), x) < 1.1 * error
    assert rounded(x, cast).unique().numel() <= 2**8


def test_stochastic_rounding_has_the_mean_that_it_rounds() -> None:
    x = torch.randn(8, 4, 16, 16)
    by_chance = replace(E5M2, stochastic=True)
    many = torch.stack([rounded(x, by_chance) for _ in range(64)])
    assert 1.2 * relative(rounded(x, E5M2), x) < relative(many[0], x) < 2 * relative(rounded(x, E5M2), x)
    assert relative(many.mean(0), x) < 1.1 * relative(many[0], x) / 8  # 64 independent errors
    x[0, 0, 0, 0] = float("inf")
    assert rounded(x, by_chance)[0, 0, 0, 0].isnan()


def test_what_is_not_finite_becomes_nan_and_harms_nothing() -> None:
    x = torch.randn(100)
    clean = rounded(x.clone().index_fill_(0, torch.tensor([3]), 0.0), E4M3)
    x[3] = float("inf")
    made = rounded(x, E4M3)
    assert made[3].isnan()
    assert torch.equal(made[:3], clean[:3])
    assert torch.equal(made[4:], clean[4:])
    assert rounded(torch.empty(0, 3), E4M3).shape == (0, 3)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_all_three_products_read_rounded_operands(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    conv = kind(4, 6, 3)
    model = nn.Sequential(conv)
    apply(model, PrecisionPlan.of("fp32", {"0": "tensor"}), emulate=True)
    x = torch.randn(2, 4, *[8] * dims, requires_grad=True)
    y = model(x)
    assert y.dtype is torch.float32
    g = torch.randn_like(y)
    y.backward(g)
    plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    qx, qw = rounded(x, E4M3).requires_grad_(), rounded(conv.weight, E4M3).requires_grad_()
    exact = plain(qx, qw, conv.bias)
    exact.backward(rounded(g.bfloat16(), E5M2).float())  # in the region's format first
    assert relative(y, exact) < 0.006  # bf16 rounds the operands' scaled values and the result
    assert relative(x.grad, qx.grad) < 0.01
    assert relative(conv.weight.grad, qw.grad) < 0.01
    assert relative(y, plain(x, conv.weight, conv.bias)) > 0.02


def test_it_is_emulation_and_has_to_be_asked_for() -> None:
    plan = apply(network(), "tensor", emulate=True)
    reasons = {decision.layer: (decision.new, decision.reason) for decision in plan.decisions}
    assert reasons["0"] == reasons["2"] == ("tensor", Reason.EMULATED)
    assert "multiplied in BF16" in plan.decisions[0].detail


@pytest.mark.parametrize("recipe", ["row", "block", "delayed", "row_gw_hp"])
def test_scales_of_parts_fall_back(recipe: str) -> None:
    assert not can_be_emulated(RECIPES[recipe], nn.Conv2d)
    plan = apply(network(), recipe, emulate=True)
    assert (plan.decisions[0].new, plan.decisions[0].reason) == ("bf16", Reason.NO_KERNEL)


def test_a_network_learns_and_reverts() -> None:
    model = network()
    apply(model, "tensor", emulate=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    losses = []
    for _ in range(20):
        with autocast("cpu", "bf16"):
            loss = F.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    revert(model)
    assert type(model[0]) is nn.Conv2d
