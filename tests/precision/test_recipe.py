"""Recipes as values: their parts, what they refuse, how they are written and read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deepseek_mp.errors import ConfigError, FormatError, PlanError
from deepseek_mp.precision import FORMATS, OPERANDS, RECIPES, Operand, Recipe, Role, Rounding, ScaleRule
from deepseek_mp.precision.recipe import OperandRecipe, RoleRecipe
from deepseek_mp.precision.scaling import BLOCK_1X128, BLOCK_128X128, ROW

NARROW = OperandRecipe(format=FORMATS["fp8_e4m3"], granularity=BLOCK_1X128, rule=ScaleRule.CURRENT, power_of_two=True)
WEIGHT = OperandRecipe(format=FORMATS["fp8_e4m3"], granularity=BLOCK_128X128, rule=ScaleRule.CURRENT)
GRADIENT = OperandRecipe(format=FORMATS["fp8_e5m2"], granularity=ROW, rule=ScaleRule.DELAYED)
MIXED = Recipe(
    name="block",
    fprop=RoleRecipe(left=NARROW, right=WEIGHT),
    dgrad=RoleRecipe(left=GRADIENT, right=WEIGHT),
    wgrad=RoleRecipe(left=GRADIENT, right=OperandRecipe(format=FORMATS["bf16"])),
)


def test_operand_finds_the_side_that_the_product_reads() -> None:
    found = {(role, operand): MIXED.operand(role, operand) for role, sides in OPERANDS.items() for operand in sides}
    assert found == {
        (Role.FPROP, Operand.INPUT): NARROW,
        (Role.FPROP, Operand.WEIGHT): WEIGHT,
        (Role.DGRAD, Operand.GRAD_OUTPUT): GRADIENT,
        (Role.DGRAD, Operand.WEIGHT): WEIGHT,
        (Role.WGRAD, Operand.GRAD_OUTPUT): GRADIENT,
        (Role.WGRAD, Operand.INPUT): OperandRecipe(format=FORMATS["bf16"]),
    }
    assert MIXED.format is None


def test_operand_refuses_a_tensor_that_the_product_does_not_read() -> None:
    with pytest.raises(ConfigError, match=r"^operand input of dgrad\. Allowed: grad_output, weight\."):
        MIXED.operand(Role.DGRAD, Operand.INPUT)


def test_one_format_with_two_scale_rules_is_still_one_format() -> None:
    side = RoleRecipe(left=NARROW, right=WEIGHT)
    assert replace(MIXED, dgrad=side, wgrad=side).format == FORMATS["fp8_e4m3"]


@pytest.mark.parametrize("recipe", [*RECIPES.values(), MIXED], ids=str)
def test_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json(), allow_nan=False))) == recipe


def test_rounding_is_written_where_it_is_stochastic_and_read_where_it_is_named() -> None:
    by_chance = replace(NARROW, rounding=Rounding.STOCHASTIC)
    assert OperandRecipe(**{**by_chance.to_json(), "rounding": "stochastic"}) == by_chance  # by its name
    assert by_chance.to_json() == {**NARROW.to_json(), "rounding": "stochastic"}
    assert OperandRecipe.from_json(json.loads(json.dumps(by_chance.to_json()))) == by_chance != NARROW
    assert "rounding" not in NARROW.to_json()
    assert OperandRecipe.from_json({**NARROW.to_json(), "rounding": "nearest"}) == NARROW
    with pytest.raises(PlanError, match=r"^unknown rounding 'up'\. Allowed: nearest, stochastic\."):
        OperandRecipe.from_json({**NARROW.to_json(), "rounding": "up"})


def test_a_format_of_scales_is_written_where_there_is_one() -> None:
    scaled = replace(NARROW, power_of_two=False, scale_format="fp8_e4m3")
    assert scaled.scale_format is FORMATS["fp8_e4m3"]  # by its name
    assert scaled.to_json() == {**NARROW.to_json(), "power_of_two": False, "scale_format": "fp8_e4m3"}
    assert OperandRecipe.from_json(json.loads(json.dumps(scaled.to_json()))) == scaled
    assert "scale_format" not in NARROW.to_json()
    both = replace(scaled, rounding=Rounding.STOCHASTIC)
    assert OperandRecipe.from_json(json.loads(json.dumps(both.to_json()))) == both != scaled


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale_format": "fp9"}, FormatError, r"^unknown format 'fp9'\."),
        ({"scale_format": "bf16"}, PlanError, r"^scale_format bf16\. Allowed: fp8_e4m3, .*fp8_e5m2fnuz\. Use one"),
        (
            {"scale_format": "int8"},
            PlanError,
            r"^scale_format int8\. Allowed: fp8_e4m3, fp8_e5m2, .*fp8_e5m2fnuz\. Use",
        ),
        ({"scale_format": "e8m0"}, PlanError, r"scales of E8M0 are power_of_two=True"),
        ({"power_of_two": True}, PlanError, r"scale_format fp8_e4m3, power_of_two=True and .*Allowed: rule 'current'"),
        ({"rule": "delayed"}, PlanError, r"the scale rule 'delayed'\. Allowed: rule 'current' without"),
        ({"rule": "none"}, PlanError, r"the scale rule 'none'\. .* or leave out the scale_format"),
    ],
)
def test_scales_with_a_format_follow_from_the_tensor(change: Any, error: type[Exception], message: str) -> None:
    values: dict[str, Any] = {
        "format": "fp4_e2m1", "granularity": "1x16", "rule": "current", "scale_format": "fp8_e4m3",
    }  # fmt: skip
    assert OperandRecipe(**values) in RECIPES["nvfp4"].sides()
    with pytest.raises(error, match=message):
        OperandRecipe(**(values | change))


@pytest.mark.parametrize("rule", [ScaleRule.DELAYED, ScaleRule.NONE])
def test_only_operands_with_scales_of_their_own_are_rounded_stochastically(rule: ScaleRule) -> None:
    with pytest.raises(PlanError, match=rf"scale rule '{rule.value}'\. Allowed: .* of the tensor itself\. Use rule"):
        replace(NARROW, rule=rule, rounding=Rounding.STOCHASTIC)


def test_values_may_be_given_by_name() -> None:
    named: dict[str, Any] = {"format": "fp8_e5m2", "granularity": "row", "rule": "delayed"}
    assert OperandRecipe(**named) == GRADIENT


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("format", "fp9", FormatError, r"^unknown format 'fp9'\."),
        ("granularity", None, PlanError, r"^unknown granularity None\. Allowed: tensor, row"),
        ("rule", "curent", PlanError, r"^unknown scale rule 'curent'\. .* Did you mean 'current'\?$"),
        ("power_of_two", 1, PlanError, r"^power_of_two is 1\. Allowed: a value of type bool\."),
    ],
)
def test_operand_refuses_what_it_cannot_hold(field: str, value: object, error: type[Exception], message: str) -> None:
    values: dict[str, Any] = {"format": "bf16", field: value}
    with pytest.raises(error, match=message):
        OperandRecipe(**values)


def test_parts_have_the_right_type() -> None:
    with pytest.raises(PlanError, match=r"^right operand is 'bf16'\. Allowed: a value of type OperandRecipe\."):
        RoleRecipe(left=NARROW, right="bf16")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"^recipe part wgrad is None\. Allowed: a value of type RoleRecipe\."):
        replace(MIXED, wgrad=None)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"^recipe name is 7\. Allowed: a value of type str\."):
        replace(MIXED, name=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("product", [[], [NARROW.to_json()], [NARROW.to_json()] * 3, {"left": 1, "right": 2}, "ab", 2])
def test_a_product_in_json_has_two_operands(product: object) -> None:
    with pytest.raises(PlanError, match=r"^a product is .*\. Allowed: a list of its two operands\."):
        Recipe.from_json({**MIXED.to_json(), "dgrad": product})


@pytest.mark.parametrize(
    ("format", "change", "plain"),
    [
        ("bf16", {}, True),
        ("fp64", {}, True),
        ("fp8_e4m3", {}, False),
        ("int8", {}, False),
        ("bf16", {"rule": ScaleRule.CURRENT}, False),
        ("bf16", {"granularity": ROW}, False),
        ("bf16", {"power_of_two": True}, False),
    ],
)
def test_a_plain_recipe_is_one_unscaled_wide_format(format: str, change: dict[str, Any], plain: bool) -> None:
    side = OperandRecipe(format=FORMATS[format], **change)
    product = RoleRecipe(left=side, right=side)
    recipe = Recipe(name="mine", fprop=product, dgrad=product, wgrad=product)
    assert recipe.is_plain == plain
    assert recipe.region == (format if plain else "bf16")


def test_one_other_operand_makes_a_recipe_not_plain() -> None:
    mixed = replace(RECIPES["bf16"], wgrad=RECIPES["fp32"].wgrad)
    assert not mixed.is_plain
    assert not MIXED.is_plain


def test_sides_are_the_six_operands() -> None:
    assert list(MIXED.sides()) == [NARROW, WEIGHT, GRADIENT, WEIGHT, GRADIENT, OperandRecipe(format=FORMATS["bf16"])]
    assert [side.is_scaled for side in MIXED.sides()] == [True] * 5 + [False]
