"""Recipes put together of two."""

import json

import pytest

from deepseek_mp.precision import RECIPES, PrecisionPlan, Recipe, Role
from deepseek_mp.precision.composite import named_mixture, with_roles

BLOCK, BF16 = RECIPES["block"], RECIPES["bf16"]


def test_each_product_comes_from_one_of_the_two():
    made = with_roles(BLOCK, [Role.WGRAD, Role.DGRAD], BF16)
    assert made.name == "block[dgrad+wgrad]"
    assert made.fprop == BF16.fprop
    assert made.dgrad == BLOCK.dgrad
    assert made.wgrad == BLOCK.wgrad


def test_all_or_nothing_is_no_composite():
    assert with_roles(BLOCK, list(Role), BF16) is BLOCK
    assert with_roles(BLOCK, [], BF16) is BF16
    assert with_roles(BF16, [Role.FPROP], BF16) is BF16


@pytest.mark.parametrize("roles", [[Role.FPROP], [Role.DGRAD, Role.WGRAD]])
def test_a_composite_survives_a_plan_on_disk(roles):
    made = with_roles(BLOCK, roles, BF16)
    assert Recipe.from_json(json.loads(json.dumps(made.to_json()))) == made
    plan = PrecisionPlan.of("bf16", {"up": made})
    assert PrecisionPlan.from_json(json.loads(json.dumps(plan.to_json()))).recipe_for("up") == made


def test_a_mixture_is_found_by_its_name():
    made = with_roles(BLOCK, [Role.DGRAD, Role.WGRAD], BF16)
    assert named_mixture(made.name, BF16) == made
