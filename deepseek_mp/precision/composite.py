"""Recipes put together of others: one recipe for some products of a unit, another for the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from deepseek_mp.precision.recipe import Recipe
from deepseek_mp.precision.recipes import find_recipe
from deepseek_mp.precision.roles import Role


def with_roles(recipe: Recipe, roles: Collection[Role], other: Recipe) -> Recipe:
    """`recipe` in the products named and `other` in the rest, named for example `block[dgrad+wgrad]`.

    All or none of the products give `recipe` or `other` itself.
    """
    chosen = [role for role in Role if role in roles]
    if not chosen or recipe == other:
        return other
    if len(chosen) == len(Role):
        return recipe
    parts = {role.value: other.role(role) for role in Role if role not in chosen}
    return replace(recipe, name=f"{recipe.name}[{'+'.join(role.value for role in chosen)}]", **parts)


def named_mixture(name: str, other: Recipe) -> Recipe:
    """The mixture of that name, `block[dgrad+wgrad]`, with `other` in the rest."""
    own, roles = name.rstrip("]").split("[")
    return with_roles(find_recipe(own), [Role(role) for role in roles.split("+")], other)
