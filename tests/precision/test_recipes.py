"""The named recipes: what each represents how, as the published descriptions say, and their variants."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deepseek_mp.errors import PlanError
from deepseek_mp.precision import (
    FORMATS,
    OPERANDS,
    RECIPES,
    Operand,
    PrecisionPlan,
    Recipe,
    Role,
    ScaleRule,
    as_fnuz,
    find_recipe,
    with_power_of_two,
)
from deepseek_mp.precision.recipe import OperandRecipe
from deepseek_mp.precision.recipes import PLAIN

SCALED = [recipe for recipe in RECIPES.values() if recipe.name not in PLAIN]
X, W, G = Operand.INPUT, Operand.WEIGHT, Operand.GRAD_OUTPUT


def table(recipe: Recipe) -> dict[tuple[Role, Operand], str]:
    """Format and granularity of every operand, in short."""
    found = {}
    for role, operands in OPERANDS.items():
        for operand in operands:
            side = recipe.operand(role, operand)
            found[role, operand] = f"{side.format.name.removeprefix('fp8_')} {side.granularity.name} {side.rule}"
    return found


def each(x: str, w: str, g: str) -> dict[tuple[Role, Operand], str]:
    return {(role, operand): {X: x, W: w, G: g}[operand] for role, operands in OPERANDS.items() for operand in operands}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_recipes_use_one_unscaled_format(name: str) -> None:
    recipe = RECIPES[name]
    assert (recipe.name, str(recipe), recipe.format, recipe.region) == (name, name, FORMATS[name], name)
    assert recipe.is_plain
    assert set(recipe.sides()) == {OperandRecipe(format=FORMATS[name])}


def test_what_the_names_mean() -> None:
    row = "e4m3 row current"
    assert table(RECIPES["tensor"]) == each("e4m3 tensor current", "e4m3 tensor current", "e5m2 tensor current")
    assert table(RECIPES["delayed"]) == each("e4m3 tensor delayed", "e4m3 tensor delayed", "e5m2 tensor delayed")
    assert table(RECIPES["row"]) == each(row, row, row)
    high = {(Role.WGRAD, X): "bf16 tensor none", (Role.WGRAD, G): "bf16 tensor none"}
    assert table(RECIPES["row_gw_hp"]) == each(row, row, row) | high
    block = "e4m3 1x128 current"
    assert table(RECIPES["block"]) == each(block, "e4m3 128x128 current", block)
    assert table(RECIPES["mx"]) == each(*["e4m3 1x32 current"] * 3)
    rounded = {recipe.name for recipe in SCALED if any(side.power_of_two for side in recipe.sides())}
    assert rounded == {"mx", "mx_fnuz", *(r.name for r in SCALED if r.name.endswith("_pow2"))}


def test_nvfp4_is_e2m1_in_groups_of_16_with_e4m3_scales_for_everything() -> None:
    recipe = RECIPES["nvfp4"]
    assert table(recipe) == each(*["fp4_e2m1 1x16 current"] * 3)
    assert {side.scale_format for side in recipe.sides()} == {FORMATS["fp8_e4m3"]}
    assert not any(side.scale_format for other in RECIPES.values() if other is not recipe for side in other.sides())
    assert with_power_of_two(recipe) is recipe  # scales that have a format stay
    assert as_fnuz(recipe) is recipe


def test_fp8_reads_as_row_until_the_device_is_known() -> None:
    assert RECIPES["fp8"] == replace(RECIPES["row"], name="fp8")
    assert PrecisionPlan.of("bf16", {"mlp": "fp8"}).to_json()["rules"] == [{"pattern": "mlp", "recipe": "fp8"}]


@pytest.mark.parametrize("recipe", SCALED, ids=str)
def test_scaled_recipes_run_inside_a_bf16_region(recipe: Recipe) -> None:
    assert not recipe.is_plain
    assert recipe.region == "bf16"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)
@pytest.mark.parametrize("change", [with_power_of_two, as_fnuz, lambda r: with_power_of_two(as_fnuz(r))])
def test_every_variant_survives_json(recipe: Recipe, change: Any) -> None:
    made = change(recipe)
    assert Recipe.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False))) == made
    plan = PrecisionPlan.of(made, {"head": made})
    assert PrecisionPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_changed_recipe_under_a_known_name_is_written_in_full() -> None:
    mine = replace(RECIPES["block"], fprop=RECIPES["row"].fprop)
    data = PrecisionPlan.of(mine).to_json()["base"]
    assert data["name"] == "block"
    assert PrecisionPlan.from_json(PrecisionPlan.of(mine).to_json()).base == mine != RECIPES["block"]


def test_powers_of_two_are_for_scales() -> None:
    made = with_power_of_two(RECIPES["row_gw_hp"])
    assert made.name == "row_gw_hp_pow2"
    assert all(side.power_of_two == (side.rule == ScaleRule.CURRENT) for side in made.sides())
    assert with_power_of_two(made) is made
    assert with_power_of_two(RECIPES["mx"]) is RECIPES["mx"]
    assert with_power_of_two(RECIPES["bf16"]) is RECIPES["bf16"]


def test_the_fnuz_twin_differs_in_formats_only() -> None:
    made = as_fnuz(RECIPES["tensor"])
    assert (made.name, made.region) == ("tensor_fnuz", "bf16")
    assert {side.format.name for side in made.sides()} == {"fp8_e4m3fnuz", "fp8_e5m2fnuz"}
    back = {"fp8_e4m3fnuz": FORMATS["fp8_e4m3"], "fp8_e5m2fnuz": FORMATS["fp8_e5m2"]}
    twins = [replace(side, format=back[side.format.name]) for side in made.sides()]
    assert twins == list(RECIPES["tensor"].sides())
    assert as_fnuz(made) is made
    assert as_fnuz(RECIPES["fp16"]) is RECIPES["fp16"]


def test_find_takes_a_name_or_a_recipe() -> None:
    mine = replace(RECIPES["block"], name="mine")
    assert find_recipe("block") is RECIPES["block"]
    assert find_recipe(mine) is mine


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bf61", r"^unknown recipe 'bf61'\. Allowed: fp64, .*fp16, fp8, .*mx.*\. Use one .*\. Did you mean 'bf16'"),
        ("fp8_e4m3", r"^unknown recipe 'fp8_e4m3'\..* Did you mean 'fp8'"),
        (None, r"^unknown recipe None\."),
        (["bf16"], r"^unknown recipe \['bf16'\]\."),
        (FORMATS["bf16"], r"^unknown recipe Format\("),
    ],
)
def test_find_refuses_other_values(recipe: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        find_recipe(recipe)
