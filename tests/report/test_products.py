"""Two recipes differ where their products do, not where their names do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_mp.precision import RECIPES, Decision, Reason, Role, find_recipe
from deepseek_mp.records import read_run
from deepseek_mp.report.layers import LayerHistory, read_layers
from deepseek_mp.report.products import compare_layers, product


@pytest.fixture
def layers(record: Callable[..., Path]) -> Callable[..., LayerHistory]:
    """The choices of a run whose layers have these recipes."""
    made = iter(range(100))

    def build(**recipes: str) -> LayerHistory:
        given = [
            (0, Decision(layer=name, old="fp32", new=recipe, reason=Reason.REQUESTED))
            for name, recipe in recipes.items()
        ]
        return read_layers(read_run(record(f"run{next(made)}", decisions=given)))

    return build


def test_recipes_that_share_two_products_differ_in_the_third(layers: Callable[..., LayerHistory]) -> None:
    found = list(compare_layers(layers(a="row", b="row"), layers(a="row_gw_hp", b="row"), RECIPES, RECIPES))
    assert [(d.layer, d.role, d.a, d.b) for d in found] == [("a", "wgrad", "row", "row_gw_hp")]
    assert (found[0].product_a, found[0].product_b) == ("fp8_e4m3 row current", "bf16")
    assert found[0].to_json()["role"] == "wgrad"


def test_one_name_for_two_recipes_of_one_s_own(layers: Callable[..., LayerHistory]) -> None:
    mine = replace(find_recipe("bf16"), name="mine")
    other = replace(mine, dgrad=find_recipe("fp32").dgrad)
    found = list(compare_layers(layers(a="mine"), layers(a="mine"), {"mine": mine}, {"mine": other}))
    assert [(d.role, d.product_a, d.product_b) for d in found] == [("dgrad", "bf16", "fp32")]


def test_layers_that_one_run_lacks_and_a_run_without_decisions(layers: Callable[..., LayerHistory]) -> None:
    found = list(compare_layers(layers(a="bf16"), layers(a="bf16", b="bf16"), RECIPES, RECIPES))
    assert {(d.layer, d.a, d.b) for d in found} == {("b", "(no decision)", "bf16")}
    assert list(compare_layers(layers(a="bf16"), layers(), RECIPES, RECIPES)) == []


@pytest.mark.parametrize(
    ("recipe", "role", "text"),
    [
        ("fp32", Role.FPROP, "fp32"),
        ("block", Role.FPROP, "fp8_e4m3 1x128 current x fp8_e4m3 128x128 current"),
        ("delayed_pow2", Role.WGRAD, "fp8_e5m2 tensor delayed power_of_two x fp8_e4m3 tensor delayed power_of_two"),
        ("of another release", Role.FPROP, "of another release"),
    ],
)
def test_a_product_in_words(recipe: str, role: Role, text: str) -> None:
    assert product(RECIPES, recipe, role) == text


def test_rounding_is_part_of_a_product() -> None:
    row = find_recipe("row")
    mine = replace(row, name="mine", dgrad=replace(row.dgrad, left=replace(row.dgrad.left, rounding="stochastic")))
    assert product({"mine": mine}, "mine", "dgrad") == "fp8_e4m3 row current stochastic x fp8_e4m3 row current"
