"""Which products of which layers two runs computed in different ways, and how a recipe computes a product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deepseek_mp.precision import Recipe, Role
from deepseek_mp.precision.recipe import OperandRecipe
from deepseek_mp.report.layers import ROLES, LayerHistory

Recipes = Mapping[str, Recipe]
ABSENT = "(no decision)"
USUAL = ("format", "granularity", "rule", "power_of_two")
"""What the record of every operand has; more is there only where it is not the usual, such as stochastic rounding."""


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """One product of one layer that the runs computed in different ways; `a` and `b` name the recipes."""

    layer: str
    role: str
    a: str
    b: str
    product_a: str
    product_b: str
    """The operands of this product: format, granularity and scale rule."""

    def to_json(self) -> dict[str, str]:
        return dict(vars(self))


def compare_layers(
    a: LayerHistory, b: LayerHistory, recipes_a: Recipes, recipes_b: Recipes
) -> Iterator[LayerDifference]:
    """The products that the runs compute in different ways at their ends; none if a run has no decisions at all."""
    in_a, in_b = a.recipes(), b.recipes()
    if not in_a or not in_b:
        return
    for layer in dict.fromkeys([*in_a, *in_b]):
        for role in ROLES:
            name_a, name_b = in_a.get(layer, {}).get(role, ABSENT), in_b.get(layer, {}).get(role, ABSENT)
            product_a, product_b = product(recipes_a, name_a, role), product(recipes_b, name_b, role)
            if product_a != product_b:
                yield LayerDifference(
                    layer=layer, role=role, a=name_a, b=name_b, product_a=product_a, product_b=product_b
                )


def product(recipes: Recipes, name: str, role: str) -> str:
    """How the recipe `name` represents the operands of a product; the name itself if it is not known."""
    if name not in recipes:
        return name
    found = recipes[name].role(Role(role))
    left, right = _operand(found.left), _operand(found.right)
    return left if left == right else f"{left} x {right}"


def _operand(operand: OperandRecipe) -> str:
    """Format, granularity and scale rule, and what else its record names because it is not the usual."""
    words = [operand.format.name]
    if operand.is_scaled:
        words += [operand.granularity.name, operand.rule.value]
    if operand.power_of_two:
        words.append("power_of_two")
    return " ".join([*words, *(str(value) for name, value in operand.to_json().items() if name not in USUAL)])
