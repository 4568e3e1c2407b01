"""Choices, items and budgets: what they refuse."""

from __future__ import annotations

import math

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.precision.allocation import Budget, Choice, Item


@pytest.mark.parametrize("value", [math.nan, -math.inf, "1", None, True])
@pytest.mark.parametrize("field", ["seconds", "loss", "noise", "bytes"])
def test_a_cost_is_a_finite_number(field: str, value: object) -> None:
    costs = {"seconds": 1.0, "loss": 0.0, "noise": 0.0, "bytes": 0.0, field: value}
    with pytest.raises(ConfigError, match=rf"^choice 'fp8': {field} is .* Allowed: a number from "):
        Choice("fp8", **costs)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["loss", "noise", "bytes"])
def test_a_budget_is_above_zero_and_finite(field: str, limit: float) -> None:
    with pytest.raises(ConfigError, match=rf"^budget: {field} is .* Allowed: a number above 0 to 1e\+100\."):
        Budget(**{"loss": 1.0, "noise": 1.0, field: limit})


def test_an_item_needs_a_choice_that_may_be_chosen() -> None:
    with pytest.raises(ConfigError, match=r"^item 'a' has 0 choices, none of finite loss\."):
        Item("a", ())
    with pytest.raises(ConfigError, match=r"^item 'a' has 1 choices, none of finite loss\."):
        Item("a", (Choice("fp4", 1.0, math.inf, 0.0),))


def test_choices_of_an_item_have_different_names() -> None:
    with pytest.raises(ConfigError, match=r"^item 'a': choices: two are named 'bf16'\."):
        Item("a", (Choice("bf16", 1.0, 0.0, 0.0), Choice("bf16", 2.0, 0.0, 0.0)))
