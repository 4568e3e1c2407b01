"""Which FP8 recipe suits a device, and what to use instead of one that it cannot run."""

from __future__ import annotations

from deepseek_mp.backends.capabilities import Capabilities
from deepseek_mp.precision import RECIPES, Recipe, as_fnuz

BEST_FP8 = {"sm_90": "block"}
"""By row of the capability table. Block scales are the finest that Hopper's products keep at full rate. Other
FP8 units take a scale per row; data-centre Blackwell could apply 1x32 scales in hardware, but the kernel of `mx`
does not use it in this release."""
FP8_ELSEWHERE = "row"


def fp8_recipe(capabilities: Capabilities) -> Recipe:
    """What the recipe name 'fp8' means on this device, in the kind of FP8 it has (OCP, or AMD's fnuz)."""
    recipe = RECIPES[BEST_FP8.get(capabilities.id, FP8_ELSEWHERE)]
    twin = as_fnuz(recipe)
    return twin if formats_of(twin) <= capabilities.matmul_formats else recipe


def nearest_recipe(recipe: Recipe, capabilities: Capabilities) -> str:
    """The name of the recipe nearest to `recipe` that the device multiplies natively.

    The same in the device's own kind of FP8, else its best in FP8, else its nearest plain format.
    """
    for candidate in (as_fnuz(recipe), fp8_recipe(capabilities)):
        if candidate != recipe and formats_of(candidate) <= capabilities.matmul_formats:
            return candidate.name
    return capabilities.nearest(recipe.fprop.left.format.name)


def formats_of(recipe: Recipe) -> frozenset[str]:
    """Names of the formats that the device must multiply: those of the operands and of the region."""
    return frozenset({recipe.region, *(side.format.name for side in recipe.sides())})
