"""Hard limits: each named with its number, healthy tensors pass."""

import re

import pytest
import torch

from deepseek_mp.controller.limits import broken, ideal_error, is_crowded_out, out_of_range, violations
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.ops.statistics import ERROR_FIELDS, rounding_error
from deepseek_mp.precision import RECIPES, Operand, Role
from deepseek_mp.sensitivity import Effect, UnitReading
from deepseek_mp.sensitivity.measure import PRODUCT_OPERANDS


def effect(**changed):
    """Errors of nothing, but for those named of grad_output or input of every product."""
    errors = {which: dict.fromkeys(ERROR_FIELDS, 0.0) for which in PRODUCT_OPERANDS}
    for (_, operand), values in errors.items():
        values.update(changed.get(operand.value, {}))
    return Effect(first=0.0, standard_error=0.0, second=0.0, errors=errors)


@pytest.mark.parametrize(
    ("operand", "errors", "role", "words"),
    [
        ("input", {"underflow": 0.006}, Role.FPROP, "0.60% of input become zero"),
        ("grad_output", {"underflow": 0.06}, Role.WGRAD, "6.00% of grad_output become zero"),
        ("grad_output", {"bias": -0.03}, Role.DGRAD, "grad_output is biased by -0.030"),
        ("input", {"by_row": 0.01}, Role.FPROP, "row-balanced error of input is 14.5 times the format's"),
        ("input", {"overflow": 0.5}, Role.FPROP, "50.00% of input overflow"),
    ],
)
def test_each_limit_is_named_with_its_number(operand, errors, role, words):
    assert list(violations(effect(**{operand: errors}), RECIPES["block"], role)) == [words]


def test_limits_hold_for_the_products_that_read_the_tensor():
    found = effect(grad_output={"bias": 0.5})
    assert list(violations(found, RECIPES["block"], Role.FPROP)) == []
    assert len(list(violations(found, RECIPES["block"], Role.DGRAD))) == 1


def test_plain_formats_have_only_their_range():
    found = effect(input={"underflow": 0.5, "by_row": 1.0})
    assert list(violations(found, RECIPES["bf16"], Role.FPROP)) == []


@pytest.mark.parametrize("name", ["bf16", "fp16", "tensor", "row", "nvfp4"])
def test_normal_values_are_healthy_in_every_recipe(name):
    side, x = RECIPES[name].fprop.left, torch.randn(256, 512)
    errors = dict(zip(ERROR_FIELDS, rounding_error(x, rounded(x, side)).tolist(), strict=True))
    assert errors["relative"] == pytest.approx(ideal_error(side.format), rel=0.25)
    assert list(violations(effect(input=errors), RECIPES[name], Role.FPROP)) == []


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
    lost = effect(input={"underflow": 0.006})
    assert broken(lost, RECIPES["row"], list(Role)) == "0.60% of input become zero"
    assert not broken(lost, RECIPES["row"], [Role.DGRAD])


def test_outliers_do_harm_from_a_quarter_of_the_limit_on():
    for share, does in ((0.001, False), (0.0015, True)):
        found = effect(input={"underflow": share})
        assert is_crowded_out(found, RECIPES["tensor"], list(Role)) is does
        assert not is_crowded_out(found, RECIPES["tensor"], [Role.DGRAD])  # which does not read the input
        assert not is_crowded_out(found, RECIPES["nvfp4"], list(Role))  # which loses some percent of any values
