"""The recipes with names: one per plain format, and the published ways to train in FP8 and FP4.

    name       input          weight           gradient       notes
    tensor     E4M3 tensor    E4M3 tensor      E5M2 tensor    one scale per tensor
    delayed    as tensor, with scales from past steps
    row        E4M3 row       E4M3 row         E4M3 row       one scale per row of each operand
    row_gw_hp  as row, but the weight's gradient is multiplied in BF16
    block      E4M3 1x128     E4M3 128x128     E4M3 1x128     as DeepSeek-V3 trains
    mx         E4M3 1x32      E4M3 1x32        E4M3 1x32      scales are powers of two
    fp8        stands for the best of these on a device
    nvfp4      E2M1 1x16      E2M1 1x16        E2M1 1x16      scales are E4M3 times one FP32 scale; emulated only

Each FP8 recipe but `fp8` and `mx` also with scales that are powers of two (`block_pow2`), and each but `fp8` in the
FP8 kind of AMD's gfx942 (`row_fnuz`).

`fp8` is a name for a plan that does not know its device yet. It reads as `row`, which every FP8 device
can run, and is replaced when a plan is applied (`backends.fp8_recipe`); the applied plan says by what.

Sources: tensor and row, "FP8 formats for deep learning", arXiv 2209.05433, with the recipes of torchao;
block, the DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3; mx, OCP microscaling formats 1.0
and "Recipes for pre-training LLMs with MXFP8", arXiv 2506.08027; nvfp4, "Pretraining large language models with NVFP4",
arXiv 2509.25149, for its number format. That report also scales weights by blocks of 16x16, rounds gradients
stochastically, rotates the operands of wgrad by a Hadamard transform and keeps some layers in BF16. The recipe has
none of these: all operands are 1x16 and rounded to the nearest, and layers are chosen by the rules of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from deepseek_mp.precision.checks import find
from deepseek_mp.precision.formats import (
    BF16,
    FORMATS,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E4M3FNUZ,
    FP8_E5M2,
    FP8_E5M2FNUZ,
    Format,
)
from deepseek_mp.precision.recipe import OperandRecipe, Recipe, RoleRecipe
from deepseek_mp.precision.roles import Role
from deepseek_mp.precision.scaling import (
    BLOCK_1X128,
    BLOCK_128X128,
    MX_1X32,
    NV_1X16,
    ROW,
    TENSOR,
    Granularity,
    ScaleRule,
)

PLAIN = ("fp64", "fp32", "tf32", "hf32", "bf16", "fp16")
_FNUZ = {FP8_E4M3: FP8_E4M3FNUZ, FP8_E5M2: FP8_E5M2FNUZ}


def uniform(format: Format) -> Recipe:
    """The recipe that uses one unscaled format everywhere, named after it."""
    return _everywhere(format.name, OperandRecipe(format=format))


def with_power_of_two(recipe: Recipe) -> Recipe:
    """The recipe with scales rounded to powers of two, named with `_pow2`; itself where they are already.

    Scales that have a format of their own stay as they are.
    """
    return _changed(
        recipe, "pow2", lambda side: replace(side, power_of_two=side.is_scaled and side.scale_format is None)
    )


def as_fnuz(recipe: Recipe) -> Recipe:
    """The recipe in the fnuz twins of its FP8 formats (AMD gfx942), named with `_fnuz`; itself without any."""
    return _changed(recipe, "fnuz", lambda side: replace(side, format=_FNUZ.get(side.format, side.format)))


def find_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or the recipe itself; `PlanError` names the known ones."""
    return find("recipe", RECIPES, recipe)


def _changed(recipe: Recipe, suffix: str, change: Callable[[OperandRecipe], OperandRecipe]) -> Recipe:
    roles: dict[str, Any] = {
        role.value: RoleRecipe(left=change(recipe.role(role).left), right=change(recipe.role(role).right))
        for role in Role
    }
    made = replace(recipe, **roles)
    return recipe if made == recipe else replace(made, name=f"{recipe.name}_{suffix}")


def _by_tensor(name: str, x: OperandRecipe, weight: OperandRecipe, gradient: OperandRecipe) -> Recipe:
    """The recipe that represents each tensor alike in both products that read it."""
    return Recipe(
        name=name,
        fprop=RoleRecipe(left=x, right=weight),
        dgrad=RoleRecipe(left=gradient, right=weight),
        wgrad=RoleRecipe(left=gradient, right=x),
    )


def _scaled(format: Format, granularity: Granularity, rule: ScaleRule = ScaleRule.CURRENT) -> OperandRecipe:
    return OperandRecipe(format=format, granularity=granularity, rule=rule)


def _per_tensor(name: str, rule: ScaleRule) -> Recipe:
    narrow, wide = _scaled(FP8_E4M3, TENSOR, rule), _scaled(FP8_E5M2, TENSOR, rule)
    return _by_tensor(name, narrow, narrow, wide)


def _everywhere(name: str, side: OperandRecipe) -> Recipe:
    return _by_tensor(name, side, side, side)


def _fp8() -> list[Recipe]:
    row = _everywhere("row", _scaled(FP8_E4M3, ROW))
    tokens = _scaled(FP8_E4M3, BLOCK_1X128)
    return [
        replace(row, name="fp8"),
        _per_tensor("tensor", ScaleRule.CURRENT),
        _per_tensor("delayed", ScaleRule.DELAYED),
        row,
        replace(row, name="row_gw_hp", wgrad=uniform(BF16).wgrad),
        _by_tensor("block", tokens, _scaled(FP8_E4M3, BLOCK_128X128), tokens),
        _everywhere("mx", replace(_scaled(FP8_E4M3, MX_1X32), power_of_two=True)),
    ]


def _nvfp4() -> Recipe:
    return _everywhere("nvfp4", replace(_scaled(FP4_E2M1, NV_1X16), scale_format=FP8_E4M3))


def _named() -> list[Recipe]:
    scaled = _fp8()
    own = [recipe for recipe in scaled if recipe.name != "fp8"]
    rounded = [with_power_of_two(recipe) for recipe in own if recipe.name != "mx"]
    return [*(uniform(FORMATS[name]) for name in PLAIN), *scaled, _nvfp4(), *rounded, *map(as_fnuz, own)]


RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _named()})
