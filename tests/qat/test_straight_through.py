"""Rounded weights are those that a deployed layer stores, and gradients are straight-through or those of LSQ."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_mp.ops.weight_only import quantised_weight, rounded_by
from deepseek_mp.qat.straight_through import learned_step, straight_through

Q = 127


def rows():
    made = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    made[2] = 0
    return made.requires_grad_()


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_values_are_those_that_are_stored_bit_for_bit_and_gradients_pass(format):
    weight = rows()
    q, scale = quantised_weight(weight, format)
    found = straight_through(weight, format)
    assert torch.equal(found, q.float() * scale[:, None])
    given = torch.randn_like(found)
    found.backward(given)
    assert torch.equal(weight.grad, given)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_stay_visible(bad):
    weight = rows().detach()
    weight[1, 3] = bad
    assert not straight_through(weight, "int8")[1].isfinite().all()
    assert not straight_through(weight, "fp8")[1].isfinite().all()
    found = learned_step(weight, torch.full((6,), 0.02), "int8")
    assert torch.equal(found[1, 3].nan_to_num(7), torch.tensor(bad).nan_to_num(7))


def test_with_a_learned_step_values_are_integers_of_it_within_the_range():
    weight, step = rows().detach(), torch.linspace(0.005, 0.05, 6)
    found = learned_step(weight, step, "int8")
    assert torch.equal(found, rounded_by(weight, step, "int8").float() * step[:, None])
    assert float((found / step[:, None]).abs().max()) == Q
    assert (weight.abs() > Q * step[:, None]).any()


def surrogate(weight, step):
    """Autograd's own derivative where rounding counts as the identity (Esser et al., 2020, equation 3)."""
    ratio = (weight / step[:, None]).clamp(-Q, Q)
    return (ratio + (ratio.round() - ratio).detach()) * step[:, None]


def test_gradients_are_those_of_lsq():
    weight, step = rows(), torch.linspace(0.005, 0.05, 6).requires_grad_()
    given = torch.randn(6, 40)
    learned_step(weight, step, "int8").backward(given)
    expected = torch.autograd.grad(surrogate(weight, step), (weight, step), given)
    torch.testing.assert_close(weight.grad, expected[0])
    torch.testing.assert_close(step.grad, expected[1] / math.sqrt(40 * Q))


def test_the_gradient_of_a_step_is_the_slope_of_the_straightened_rounding():
    weight, step = rows().detach().double(), torch.linspace(0.005, 0.05, 6, dtype=torch.float64)
    ratio = (weight / step[:, None]).clamp(-Q, Q)
    shift = ratio.round() - ratio  # held while the step moves

    def straightened(moved):
        return (((weight / moved[:, None]).clamp(-Q, Q) + shift) * moved[:, None]).sum(1)

    slope = (straightened(step + 1e-7) - straightened(step - 1e-7)) / 2e-7
    learned = step.float().requires_grad_()
    learned_step(weight.float(), learned, "int8").sum().backward()
    torch.testing.assert_close(learned.grad.double() * math.sqrt(40 * Q), slope, rtol=1e-3, atol=1e-3)
