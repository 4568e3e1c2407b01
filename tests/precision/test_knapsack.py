"""The scaled problem: which options remain, and what one unit stands for."""

from __future__ import annotations

import math

import pytest

from deepseek_mp.precision.allocation import Budget, Choice, Item
from deepseek_mp.precision.knapsack import build, priced, sums

WIDE = Budget(loss=1e3, noise=1e3)


def options(*choices: Choice, budget: Budget = WIDE) -> list[int]:
    """Which choices of a lone item remain, by cost."""
    problem = build([Item("a", choices)], budget, "seconds")
    assert problem is not None
    return [option[-1] for option in problem.groups[0]]


def test_a_dominated_choice_is_left_out() -> None:
    high, slow, fast = Choice("high", 3.0, 0.0, 0.0), Choice("slow", 2.0, 2.0, 1.0), Choice("fast", 2.0, 1.0, 1.0)
    assert options(high, slow, fast) == [2, 0]


def test_of_equal_choices_the_first_remains() -> None:
    assert options(Choice("a", 1.0, 1.0, 1.0), Choice("b", 1.0, 1.0, 1.0)) == [0]


def test_a_choice_stays_for_the_budget_it_spares() -> None:
    more_loss, more_noise, more_bytes = (
        Choice("loss", 1.0, 2.0, 1.0, 1.0),
        Choice("noise", 1.0, 1.0, 2.0, 1.0),
        Choice("bytes", 1.0, 1.0, 1.0, 2.0),
    )
    assert options(more_loss, more_noise, budget=Budget(9.0, 9.0)) == [1, 0]
    assert options(more_loss, more_bytes, budget=Budget(9.0, 9.0, 9.0)) == [1, 0]
    # Without a budget of bytes, they are no reason to take more loss.
    assert options(more_loss, more_bytes, budget=Budget(9.0, 9.0)) == [1]


def test_an_infinite_loss_and_what_never_fits_are_left_out() -> None:
    choices = (Choice("high", 3.0, 0.0, 0.0), Choice("never", 0.0, math.inf, 0.0), Choice("big", 1.0, 0.0, 2.0))
    assert options(*choices, budget=Budget(1.0, 1.0)) == [0]


def test_units_of_cost_and_use() -> None:
    items = [
        Item("b", (Choice("high", 5.0, 1.0, 0.0), Choice("low", 2.0, 4.0, -1.0))),
        Item("a", (Choice("high", 3.0, -1.0, 0.5), Choice("low", 2.0, 3.0, 2.0))),
    ]
    problem = build(items, Budget(loss=9.0, noise=4.5), "seconds")
    assert problem is not None
    assert problem.order == [1, 0]
    assert (problem.base, problem.spread) == (4.0, 4.0)
    assert problem.room == pytest.approx((8.0, 4.0, math.inf))
    low, high = problem.groups[0]
    assert low == pytest.approx((0.0, 3.0 / 8.0, 1.5 / 4.0, 0.0, 1))
    assert high == pytest.approx((0.25, 0.0, 0.0, 0.0, 0))
    assert sums([low, high]) == pytest.approx((0.25, 3.0 / 8.0, 1.5 / 4.0, 0.0))
    assert priced(low, (8.0, 4.0, 1.0)) == pytest.approx(4.5)


def test_the_objective_may_be_bytes() -> None:
    item = Item("a", (Choice("high", 1.0, 0.0, 0.0, 100.0), Choice("low", 2.0, 1.0, 0.0, 60.0)))
    problem = build([item], WIDE, "bytes")
    assert problem is not None
    assert (problem.base, problem.spread) == (60.0, 40.0)


def test_no_problem_where_it_is_plain_that_nothing_fits() -> None:
    item = Item("a", (Choice("high", 1.0, 2.0, 0.0),))
    assert build([item], Budget(1.9, 1.0), "seconds") is None
    split = Item("a", (Choice("loss", 1.0, 2.0, 0.0), Choice("noise", 1.0, 0.0, 2.0)))
    assert build([split], Budget(1.0, 1.0), "seconds") is None


def test_a_budget_may_be_used_up() -> None:
    items = [Item(name, (Choice("high", 1.0, 0.1, 0.0), Choice("low", 0.5, 0.2, 0.0))) for name in "abc"]
    problem = build(items, Budget(loss=0.3, noise=1.0), "seconds")  # 3 x 0.1 is more than 0.3 in binary
    assert problem is not None
    assert [[option[-1] for option in group] for group in problem.groups] == [[0], [0], [0]]


def test_a_choice_that_never_fits_does_not_blur_the_others() -> None:
    item = Item("a", (Choice("high", 2.0, 0.0, 0.0), Choice("low", 1.0, 1.0, 0.0), Choice("never", -1e9, 9.0, 0.0)))
    problem = build([item], Budget(1.0, 1.0), "seconds")
    assert problem is not None
    assert (problem.base, problem.spread) == (1.0, 1.0)


def test_no_items() -> None:
    problem = build([], WIDE, "seconds")
    assert problem is not None
    assert (problem.groups, problem.base, sums([])) == ([], 0.0, (0.0, 0.0, 0.0, 0.0))
