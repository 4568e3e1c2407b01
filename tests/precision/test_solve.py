"""Solving the scaled problem: proven where it is small, close where it is large, honest where nothing fits."""

from __future__ import annotations

import itertools
import random

import pytest

from deepseek_mp.precision import solve as module
from deepseek_mp.precision.allocation import Budget, Choice, Item
from deepseek_mp.precision.knapsack import Knapsack, build, sums
from deepseek_mp.precision.solve import WIDE_GAP, Solution, solve


def random_problem(items: int, choices: int, *, least: float = 0.1) -> Knapsack:
    """A problem whose budgets are what a random allocation takes."""
    made = [
        Item(
            f"item {i}",
            tuple(
                Choice(f"choice {k}", least + random.random(), random.random(), random.random(), random.random())
                for k in range(choices)
            ),
        )
        for i in range(items)
    ]
    taken = [random.choice(item.choices) for item in made]
    loss, noise, memory = (sum(choice.amounts[k] for choice in taken) for k in range(3))
    problem = build(made, Budget(loss, noise, memory), "seconds")
    assert problem is not None
    return problem


def solved(problem: Knapsack) -> tuple[Solution, float]:
    solution = solve(problem)
    assert solution is not None
    cost, *uses = sums(solution.options)
    assert max(uses) <= 1.0 + 1e-9
    assert all(option in group for option, group in zip(solution.options, problem.groups, strict=True))
    assert solution.bound <= cost + 1e-9
    return solution, cost


@pytest.mark.parametrize("seed", range(20))
def test_a_small_problem_is_solved_exactly(seed: int) -> None:
    random.seed(seed)
    problem = random_problem(5, 4)
    best = min(c for c, *uses in map(sums, itertools.product(*problem.groups)) if max(uses) <= 1.0)
    solution, cost = solved(problem)
    assert cost == pytest.approx(best, abs=1e-9)
    assert solution.is_proven


@pytest.mark.parametrize("seed", range(5))
def test_a_large_problem_ends_close_to_its_bound(seed: int) -> None:
    random.seed(seed)
    problem = random_problem(400, 6)
    solution, cost = solved(problem)
    assert cost - solution.bound <= WIDE_GAP * (problem.base / problem.spread + cost)


def test_swaps_and_search_each_improve_what_was_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [random_problem(40, 6, least=0.01) for _ in range(10)]
    full = sum(solved(problem)[1] for problem in problems)
    monkeypatch.setattr(module, "FEW_GROUPS", -1)
    monkeypatch.setattr(module, "MOST_GROUPS", -1)
    unsearched = sum(solved(problem)[1] for problem in problems)
    monkeypatch.setattr(module, "MOST_SWAPS", 1)
    swapped_once = sum(solved(problem)[1] for problem in problems)
    monkeypatch.setattr(module, "MOST_SWAPS", 0)
    filled = sum(solved(problem)[1] for problem in problems)
    assert full < unsearched < swapped_once < filled


def test_what_repair_cannot_reach_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [
        [(3, 1, 0, 3), (2, 2, 2, 3), (2, 3, 0, 1)],
        [(3, 1, 1, 2), (0, 3, 3, 0), (1, 0, 2, 2)],
        [(0, 3, 1, 1), (1, 0, 2, 1), (1, 2, 0, 0)],
    ]
    items = [Item(str(i), tuple(Choice(str(k), *c) for k, c in enumerate(choices))) for i, choices in enumerate(costs)]
    problem = build(items, Budget(4.0, 3.0, 4.0), "seconds")
    assert problem is not None
    solution, _ = solved(problem)
    assert [option[-1] for option in solution.options] == [2, 0, 1]
    monkeypatch.setattr(module, "FEW_GROUPS", -1)
    monkeypatch.setattr(module, "MOST_GROUPS", -1)
    assert solve(problem) is None


def test_nothing_is_returned_where_nothing_fits() -> None:
    items = [Item(name, (Choice("x", 1.0, 0.8, 0.0), Choice("y", 1.3, 0.0, 0.8))) for name in "abc"]
    problem = build(items, Budget(1.0, 1.0), "seconds")
    assert problem is not None
    assert solve(problem) is None


def test_an_empty_problem() -> None:
    problem = build([], Budget(1.0, 1.0), "seconds")
    assert problem is not None
    solution, cost = solved(problem)
    assert (cost, solution.is_proven) == (0.0, True)
