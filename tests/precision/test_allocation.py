"""Choices, items and budgets: what they refuse. Allocations: what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.precision.allocation import Allocation, Budget, Choice, Item, PerBudget, Totals


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


def test_names_are_strings() -> None:
    with pytest.raises(ConfigError, match=r"^choice 8: its name is of type int\. Allowed: a string\."):
        Choice(8, 1.0, 0.0, 0.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^item \('fc1', 'fprop'\): its name is of type tuple\."):
        Item(("fc1", "fprop"), FP8.choices)  # type: ignore[arg-type]


def test_a_budget_of_bytes_may_be_left_out() -> None:
    assert Budget(1.0, 2.0).limits == (1.0, 2.0, math.inf)
    assert Budget(1.0, 2.0, 3.0).limits == (1.0, 2.0, 3.0)
    with pytest.raises(ConfigError, match=r"^budget: loss is None\."):
        Budget(None, 1.0)  # type: ignore[arg-type]


def test_what_counts_as_none() -> None:
    assert Choice("fp8", -1.0, -1e-3, -0.5, 7.0).amounts == (0.0, 0.0, 7.0)
    with pytest.raises(ConfigError, match=r"^choice 'fp8': bytes is -1\.0\. Allowed: a number from 0 to 1e\+100\."):
        Choice("fp8", 1.0, 0.0, 0.0, -1.0)
    with pytest.raises(ConfigError, match=r"loss is -inf\. Allowed: .*, or inf for 'never'\."):
        Choice("fp8", 1.0, -math.inf, 0.0)


def allocated(item: Item, chosen: int, **values: Any) -> Allocation:
    """An allocation of one item, at a going rate of 0.2 ms per 1e-4 of loss."""
    choice = item.choices[chosen]
    standard = {
        "objective": "seconds",
        "choices": {item.name: choice},
        "totals": Totals(choice.seconds, *choice.amounts),
        "multipliers": PerBudget(2.0, 0.0, None),
        "slack": PerBudget(1e-4, 1.0, None),
        "is_feasible": True,
        "bound": choice.seconds,
        "gap": 0.0,
    }
    return Allocation(**{**standard, **values})


FP8 = Item("fc1", (Choice("bf16", 1e-3, 0.0, 0.0, 2e6), Choice("fp8", 0.88e-3, 3.1e-4, 0.0, 1e6)))


def test_a_choice_that_was_too_dear() -> None:
    assert allocated(FP8, 0).explain(FP8) == (
        "bf16: fp8 would save 120 µs and cost 3.1e-4 of the loss budget, "
        "5.2 times the going rate of 200 µs per 1e-4 of loss"
    )


def test_the_next_best_choice_is_named() -> None:
    item = Item("a", (*FP8.choices, Choice("fast", 0.1e-3, 1e-3, 0.0), Choice("slow", 0.9e-3, 3.1e-4, 0.0)))
    assert allocated(item, 0).explain(item).startswith("bf16: fp8 would save")
    cheap = PerBudget(0.5, 0.0, None)
    assert allocated(item, 0, multipliers=cheap).explain(item).startswith("bf16: fast would save 900 µs")


def test_a_choice_worth_its_price_that_does_not_fit() -> None:
    words = allocated(FP8, 0, multipliers=PerBudget(0.1, 0.0, None)).explain(FP8)
    assert words == (
        "bf16: fp8 would save 120 µs and cost 3.1e-4 of the loss budget, "
        "0.26 times the going rate of 10 µs per 1e-4 of loss; only 1e-4 of the loss budget is left"
    )
    free = allocated(FP8, 0, multipliers=PerBudget(0.0, 0.0, None)).explain(FP8)
    assert free.endswith("cost 3.1e-4 of the loss budget; only 1e-4 of the loss budget is left")


def test_the_fastest_choice_says_what_it_is_taken_for() -> None:
    cheap = PerBudget(0.1, 0.0, None)
    assert allocated(FP8, 1, multipliers=cheap).explain(FP8) == (
        "fp8: taken instead of bf16 to save 120 µs and cost 3.1e-4 of the loss budget, "
        "0.26 times the going rate of 10 µs per 1e-4 of loss; no choice takes less time"
    )
    slow = Item("a", (Choice("bf16", 1.0, 0.0, 0.0), Choice("fp8", 2.0, 0.0, 0.0)))
    assert allocated(slow, 0).explain(slow) == "bf16: no choice takes less time"


def test_an_objective_and_a_budget_of_bytes() -> None:
    values: dict[str, Any] = {"objective": "bytes", "multipliers": PerBudget(1e10, 0.0, None)}
    assert allocated(FP8, 1, **values).explain(FP8) == (
        "fp8: taken instead of bf16 to save 1 MB and cost 3.1e-4 of the loss budget, "
        "3.1 times the going rate of 1 MB per 1e-4 of loss; no choice takes fewer bytes"
    )
    limited = allocated(FP8, 1, multipliers=PerBudget(0.0, 0.0, 1e-10), slack=PerBudget(1e-4, 1.0, 0.0))
    assert "bytes" not in limited.explain(FP8)  # it gives bytes back
    larger = Item("a", (Choice("x", 2.0, 0.0, 0.0, 1e6), Choice("y", 1.0, 0.0, 0.0, 3e6)))
    short = allocated(larger, 0, multipliers=PerBudget(0.0, 0.0, 1e-6), slack=PerBudget(1e-4, 1.0, 1e6))
    assert short.explain(larger) == (
        "x: y would save 1 s and cost 2 MB of the bytes budget, 2 times the going rate of 1 s per 1 MB of bytes"
    )
    # Where bytes have no budget, nobody counts them.
    assert "bytes" not in allocated(larger, 0).explain(larger)


def test_budgets_that_are_exceeded() -> None:
    slack = PerBudget(-4e-4, 0.1, -2e6)
    allocation = allocated(FP8, 0, totals=Totals(1.0, 1.4e-3, 0.0, 5e6), slack=slack, is_feasible=False)
    assert allocation.exceeded == (
        "the loss budget of 1e-3 is exceeded by 4e-4 and the bytes budget of 3 MB is exceeded by 2 MB"
    )
    assert allocation.explain(FP8) == f"bf16: the choice of least loss; {allocation.exceeded}"
    assert allocated(FP8, 0).exceeded == ""


@pytest.mark.parametrize("other", [Item("fc2", FP8.choices), Item("fc1", (Choice("fp32", 1.0, 0.0, 0.0),))])
def test_only_items_of_the_allocation_are_explained(other: Item) -> None:
    with pytest.raises(ConfigError, match=rf"^item '{other.name}' does not have the choice of this allocation"):
        allocated(FP8, 0).explain(other)
