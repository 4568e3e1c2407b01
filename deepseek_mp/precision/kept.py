"""What a unit keeps for backward, by its recipe."""

from __future__ import annotations

from deepseek_mp.precision.recipe import Recipe
from deepseek_mp.precision.roles import Role


def kept_bytes(recipe: Recipe, numbers: int) -> int:
    """Bytes of a unit's input of so many numbers, as it is kept for the product that makes the weight's gradient."""
    return numbers * recipe.role(Role.WGRAD).right.format.storage_bits // 8
