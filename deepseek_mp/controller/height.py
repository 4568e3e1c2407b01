"""How high a recipe is: what "lowered" and "raised" mean when a layer moves from one to another."""

from __future__ import annotations

from functools import cache

from deepseek_mp.precision import RECIPES, Recipe, Role


def height(recipe: Recipe) -> float:
    """The bits of the mantissa of its products' operands; of equal ones, the format with more range is higher.

    FP64 > FP32 > HF32 > TF32 > FP16 > BF16 > all FP8 recipes alike > FP4.
    """
    format = recipe.fprop.left.format
    return format.mantissa_bits + format.exponent_bits / 16


def height_of(name: str, base: Recipe) -> float:
    """That of a recipe by its name; of a mixture with the base, `block[dgrad+wgrad]`, between the two."""
    own, roles = parts_of(name)
    share = len(roles) / len(Role)
    return share * height(RECIPES[own]) + (1 - share) * height(base)


@cache
def parts_of(name: str) -> tuple[str, tuple[Role, ...]]:
    """The recipe that a mixture is of, and the products that have it: all of them where it is no mixture."""
    own, _, named = name.rstrip("]").partition("[")
    return own, tuple(Role(role) for role in named.split("+")) if named else tuple(Role)
