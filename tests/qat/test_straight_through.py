"""Rounded weights are those that a deployed layer stores, and gradients are straight-through or those of LSQ."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_mp.ops.fp8_linear import fp8_linear
from deepseek_mp.ops.int4_linear import int4_weight
from deepseek_mp.ops.reference.int4_linear import widened
from deepseek_mp.ops.weight_only import quantised_weight, rounded_by
from deepseek_mp.qat.straight_through import (
    learned_group_step,
    learned_step,
    straight_through,
    straight_through_activations,
    straight_through_groups,
)

Q = 127
LOW, TOP = -8, 7


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


@pytest.mark.parametrize("width", [256, 192, 96])
def test_in_4_bits_values_are_those_that_are_stored_bit_for_bit_and_gradients_pass(width):
    weight = torch.randn(6, width).mul_(torch.tensor([1, 1e-3, 0, 1e4, 3, 1e-30])[:, None]).requires_grad_()
    found = straight_through_groups(weight)
    assert torch.equal(found, widened(*int4_weight(weight)))
    given = torch.randn_like(found)
    found.backward(given)
    assert torch.equal(weight.grad, given)


def test_learned_scales_in_4_bits_are_those_that_are_stored_bit_for_bit():
    weight, factor = torch.randn(6, 192), torch.rand(6, 3) + 0.5
    assert torch.equal(learned_group_step(weight, factor), widened(*int4_weight(weight, factor=factor)))
    assert torch.equal(learned_group_step(weight, torch.ones(6, 3)), straight_through_groups(weight))


def test_gradients_of_learned_scales_in_4_bits_are_those_of_lsq():
    weight, factor = torch.randn(6, 192).requires_grad_(), (torch.rand(6, 3) * 0.4 + 0.5).requires_grad_()
    given = torch.randn(6, 192)
    learned_group_step(weight, factor).backward(given)
    scale, zero = (part.t().float()[..., None] for part in int4_weight(weight)[1:])
    kept = int4_weight(weight, factor=factor.detach())[1].t().float()[..., None]
    step = scale * factor[..., None]
    step = step + (kept - step).detach()
    ratio = ((weight.view(6, 3, 64) - zero) / step).clamp(LOW, TOP)
    straightened = (ratio + (ratio.round() - ratio).detach()) * step + zero
    expected = torch.autograd.grad(straightened.flatten(1), (weight, factor), given)
    assert (expected[0] == 0).any()
    torch.testing.assert_close(weight.grad, expected[0])
    torch.testing.assert_close(factor.grad, expected[1] / math.sqrt(64 * TOP))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_in_4_bits_a_group_that_is_not_finite_stays_so(bad):
    weight = torch.randn(3, 64)
    weight[1, 3] = bad
    assert not straight_through_groups(weight)[1].isfinite().any()
    assert not learned_group_step(weight, torch.ones(3, 1))[1].isfinite().any()
    assert straight_through_groups(weight)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_a_deployed_layer_multiplies(dtype):
    x = torch.randn(2, 3, 32, dtype=dtype) * torch.tensor([1e-3, 1.0, 1e3], dtype=dtype)[:, None]
    x[1, 1] = 0
    x.requires_grad_()
    found = straight_through_activations(x)
    one = torch.eye(32).to(torch.float8_e4m3fn)  # the product with it gives the rounded rows themselves
    expected = fp8_linear(x.detach().flatten(0, 1), one, torch.ones(32), None, implementation="reference")
    assert torch.equal(found, expected.view(2, 3, 32))
    assert not torch.equal(found, x)
    given = torch.randn_like(found)
    found.backward(given)
    assert torch.equal(x.grad, given)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_token_that_is_not_finite_is_nan_and_no_other_one(bad):
    x = torch.randn(4, 32)
    x[1, 3] = bad
    found = straight_through_activations(x)
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()
