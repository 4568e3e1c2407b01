"""What weights and shapes alone say of a unit: how far its output in a recipe would be from that in FP32.

The relative error of an output is close to the sum of the relative errors of the two operands. That of the weight is
measured; that of the input is taken to be that of normal values. What the error does to the loss, only data can tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepseek_mp.nn.unit import multiplies, original_class
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.ops.statistics import ERROR_FIELDS, rounding_error
from deepseek_mp.precision import Recipe
from deepseek_mp.precision.recipe import OperandRecipe
from deepseek_mp.sensitivity import can_estimate

_NORMAL = (64, 512)
_RELATIVE = ERROR_FIELDS.index("relative")


@torch.no_grad()
def output_errors(module: nn.Module, recipes: Sequence[Recipe]) -> dict[str, float]:
    """The expected relative error energy of the unit's output, by recipe; empty for a unit without products."""
    weight = module._parameters.get("weight")  # noqa: SLF001
    if weight is None or not multiplies(original_class(module)):
        return {}
    matrix = weight.detach().float().flatten(1)
    return {
        recipe.name: _error(matrix, recipe.fprop.right) + normal_error(recipe.fprop.left)
        for recipe in recipes
        if can_estimate(module, recipe)
    }


def normal_error(side: OperandRecipe) -> float:
    """The relative error energy of normal values in an operand recipe."""
    generator = torch.Generator().manual_seed(0)
    return _error(torch.randn(_NORMAL, generator=generator, device="cpu"), side)


def _error(matrix: Tensor, side: OperandRecipe) -> float:
    return float(rounding_error(matrix, rounded(matrix, side))[_RELATIVE])
