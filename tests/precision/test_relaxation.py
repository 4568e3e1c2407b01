"""The relaxation: its bound is that of the linear program, and its prices are worth it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.optimize import linprog

from deepseek_mp.precision.knapsack import Group, priced
from deepseek_mp.precision.relaxation import cheapest, relax


def random_groups(number: int, options: int, budgets: int, tightness: float) -> list[Group]:
    """Groups in scaled numbers, of which each has an option that uses nothing."""
    groups: list[Group] = []
    for _ in range(number):
        group = [(1.0 / number, 0.0, 0.0, 0.0, 0)]
        for at in range(1, options):
            uses = [random.random() / number / tightness if k < budgets else 0.0 for k in range(3)]
            group.append((random.random() / number, uses[0], uses[1], uses[2], at))
        groups.append(sorted(group))
    return groups


def exact_relaxation(groups: list[Group]) -> float:
    options = [(i, option) for i, group in enumerate(groups) for option in group]
    one_each = np.zeros((len(groups), len(options)))
    for column, (i, _) in enumerate(options):
        one_each[i, column] = 1.0
    uses = np.array([[option[k] for _, option in options] for k in (1, 2, 3)])
    solved = linprog(
        [option[0] for _, option in options], A_ub=uses, b_ub=np.ones(3), A_eq=one_each, b_eq=np.ones(len(groups))
    )
    return float(solved.fun) if solved.success else float("inf")


@pytest.mark.parametrize("tightness", [0.02, 0.3])
@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize(("number", "options"), [(3, 2), (12, 8), (60, 4)])
def test_the_bound_is_that_of_the_linear_program(number: int, options: int, budgets: int, tightness: float) -> None:
    groups = random_groups(number, options, budgets, tightness)
    relaxed = relax(groups, 1e-7, 1.0)
    assert relaxed.bound == pytest.approx(exact_relaxation(groups), abs=3e-7)
    assert not relaxed.is_infeasible


def test_the_prices_give_the_bound() -> None:
    groups = random_groups(20, 5, 3, 0.2)
    relaxed = relax(groups, 1e-6, 1.0)
    assert min(relaxed.prices) > 0.0
    total = sum(min(priced(option, relaxed.prices) for option in group) for group in groups) - sum(relaxed.prices)
    assert relaxed.bound == pytest.approx(total)


def test_what_fits_without_a_price_is_the_solution() -> None:
    groups: list[Group] = [[(0.0, 0.5, 0.1, 0.0, 1), (1.0, 0.0, 0.0, 0.0, 0)]]
    relaxed = relax(groups, 1e-6, 0.0)
    assert (relaxed.prices, relaxed.bound) == ((0.0, 0.0, 0.0), 0.0)
    assert relaxed.columns[0].picks == (groups[0][0],)


def test_budgets_that_no_mix_meets() -> None:
    # Each group uses 0.8 of one budget or the other, so that three of them use 2.4 of both together.
    groups: list[Group] = [[(0.0, 0.8, 0.0, 0.0, 0), (0.3, 0.0, 0.8, 0.0, 1)] for _ in range(3)]
    assert exact_relaxation(groups) == float("inf")
    assert relax(groups, 1e-6, 1.0).is_infeasible


def test_a_start_that_exceeds_all_budgets() -> None:
    groups: list[Group] = [[(0.0, 0.9, 0.9, 0.9, 1), (0.1, 0.3, 0.3, 0.3, 0)] for _ in range(3)]
    relaxed = relax(groups, 1e-6, 1.0)
    # 0.9 is used without the first options, and each of those uses 0.6 more: a sixth of one fits.
    assert relaxed.bound == pytest.approx(0.1 * (3 - 1 / 6), abs=2e-6)
    assert not relaxed.is_infeasible


def test_the_first_of_equal_options_is_taken() -> None:
    column = cheapest([[(0.0, 0.5, 0.0, 0.0, 0), (0.5, 0.0, 0.0, 0.0, 1)]], (1.0, 0.0, 0.0))
    assert column.picks[0][-1] == 0
    assert (column.cost, column.rows) == (0.0, (0.5, 0.0, 0.0, 1.0))
