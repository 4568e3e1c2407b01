"""Hard limits: each named with its number, healthy tensors pass."""

import re

import pytest
import torch
import torch.nn.functional as F

from deepseek_mp.controller.limits import broken, out_of_range, violations
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.ops.statistics import ERROR_FIELDS, ideal_error, rounding_error
from deepseek_mp.precision import RECIPES, Operand, Role
from deepseek_mp.sensitivity import Effect, UnitReading
from deepseek_mp.sensitivity.measure import OPERAND_FIELDS, PRODUCT_OPERANDS


def effect(**changed):
    """Errors of nothing, but for those named of grad_output or input of every product."""
    errors = {which: dict.fromkeys(OPERAND_FIELDS, 0.0) for which in PRODUCT_OPERANDS}
    for (_, operand), values in errors.items():
        values.update(changed.get(operand.value, {}))
    return Effect(first=0.0, standard_error=0.0, second=0.0, errors=errors)


@pytest.mark.parametrize(
    ("operand", "errors", "role", "words"),
    [
        ("input", {"mass": -0.007}, Role.FPROP, "input loses 0.70% of its magnitude"),
        ("grad_output", {"mass": -0.03}, Role.WGRAD, "grad_output loses 3.00% of its magnitude"),
        ("grad_output", {"lean": 0.03}, Role.WGRAD, "errors of grad_output lean to one side by 0.030"),
        ("grad_output", {"mass": 0.03}, Role.DGRAD, "grad_output gains 3.00% of its magnitude"),
        ("input", {"by_row": 0.01}, Role.FPROP, "row-balanced error of input is 14.5 times the format's"),
        ("input", {"overflow": 0.5}, Role.FPROP, "50.00% of input overflow"),
    ],
)
def test_each_limit_is_named_with_its_number(operand, errors, role, words):
    assert list(violations(effect(**{operand: errors}), RECIPES["block"], role)) == [words]


def test_limits_hold_for_the_products_that_read_the_tensor():
    found = effect(grad_output={"mass": -0.5})
    assert list(violations(found, RECIPES["block"], Role.FPROP)) == []
    assert len(list(violations(found, RECIPES["block"], Role.DGRAD))) == 1


def test_plain_formats_have_only_their_range():
    found = effect(input={"mass": -0.5, "by_row": 1.0})
    assert list(violations(found, RECIPES["bf16"], Role.FPROP)) == []


@pytest.mark.parametrize("name", ["bf16", "fp16", "tensor", "row", "nvfp4"])
def test_normal_values_are_healthy_in_every_recipe(name):
    side, x = RECIPES[name].fprop.left, torch.randn(256, 512)
    errors = dict(zip(ERROR_FIELDS, rounding_error(x, rounded(x, side)).tolist(), strict=True))
    assert errors["relative"] == pytest.approx(ideal_error(side.format), rel=0.25)
    assert list(violations(effect(input=errors), RECIPES[name], Role.FPROP)) == []


def rounded_in(name, operand, x):
    """The effect of a recipe on one operand, of these values."""
    role = Role.FPROP if operand is Operand.INPUT else Role.DGRAD
    side = RECIPES[name].operand(role, operand)
    errors = dict(zip(ERROR_FIELDS, rounding_error(x, rounded(x, side)).tolist(), strict=True))
    return errors, broken(effect(**{operand.value: errors}), RECIPES[name], [role])


def test_values_near_zero_behind_a_gelu_are_no_harm():
    x = F.gelu(3 * torch.randn(256, 512) - 6)
    for name in ("tensor", "row", "block"):
        errors, words = rounded_in(name, Operand.INPUT, x)
        assert errors["underflow"] > 0.1
        assert not words


def test_a_softmax_has_a_gradient_that_four_bits_bias():
    """A few large values and many small ones of one sign: all that becomes zero is missing from the sum."""
    scores = 3 * torch.randn(256, 4096)
    grad = scores.softmax(-1) - F.one_hot(torch.randint(4096, (256,)), 4096)
    errors, words = rounded_in("nvfp4", Operand.GRAD_OUTPUT, grad)
    assert "lean to one side" in words
    assert errors["lean"] == pytest.approx(errors["underflow"], rel=0.2)
    assert not rounded_in("tensor", Operand.GRAD_OUTPUT, grad)[1]


def test_small_values_of_both_signs_that_become_zero_lean_to_no_side():
    grad = torch.randn(256, 4096).pow(5)
    for name in ("nvfp4", "block"):
        errors, words = rounded_in(name, Operand.GRAD_OUTPUT, grad)
        assert errors["underflow"] > 0.02
        assert errors["lean"] < 0.01
    assert not words


def spread(**amax):
    return UnitReading(
        order=0,
        batches=1,
        calls=1,
        effects={"fp16": effect(grad_output={"underflow": amax.pop("lost", 0.0)}), "bf16": effect()},
        energy=1.0,
        row_energy=1.0,
        spreads={operand: {"amax": amax.get(operand.value, 0.1)} for operand in Operand},
    )


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (spread(input=2.0e4), "input reaches 2e\\+04, above 16384"),
        (spread(grad_output=0.3), "grad_output reaches 2e\\+04"),
        (spread(lost=2e-4), "0.02% of grad_output become zero"),
        (spread(), "^$"),
    ],
)
def test_the_range_of_fp16_needs_room(reading, words):
    assert re.search(words, out_of_range(reading, RECIPES["fp16"]))
    assert not out_of_range(reading, RECIPES["bf16"])


def test_limits_broken_by_several_products_are_said_once():
    lost = effect(input={"mass": -0.008})
    assert broken(lost, RECIPES["row"], list(Role)) == "input loses 0.80% of its magnitude"
    assert not broken(lost, RECIPES["row"], [Role.DGRAD])
