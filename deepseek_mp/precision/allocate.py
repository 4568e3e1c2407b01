"""Chooses one choice for each item: the least time or memory within budgets of loss, noise and memory.

This is a multiple-choice knapsack with up to three budgets. Relaxing the budgets gives a bound and prices; the
allocations near that bound are repaired, filled and improved by swaps; small problems are then searched for
a better one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision.allocation import (
    Allocation,
    Budget,
    Choice,
    Item,
    Objective,
    PerBudget,
    Totals,
    check_items,
)
from deepseek_mp.precision.checks import shown
from deepseek_mp.precision.evidence import FrozenDict
from deepseek_mp.precision.improve import Picks, improve
from deepseek_mp.precision.knapsack import Knapsack, amounts, build
from deepseek_mp.precision.relaxation import Relaxed, relax

STARTS = 3
PRECISION = 1e-5


def allocate(items: Sequence[Item], budget: Budget, objective: Objective = "seconds") -> Allocation:
    """One choice for each item."""
    items = tuple(items)
    check_items(items)
    if objective not in ("seconds", "bytes"):
        raise ConfigError(explain(f"objective is {shown(objective)}", "'seconds', 'bytes'", "Use one of these names"))
    problem = build(items, budget, objective)
    if problem is None:
        return _infeasible(items, budget, objective)
    relaxed = relax(problem.groups, PRECISION)
    best = _search(problem, relaxed)
    if best is None:
        return _infeasible(items, budget, objective)
    chosen: list[Choice] = [items[0].choices[0]] * len(items)
    for position, option in zip(problem.order, best.options, strict=True):
        chosen[position] = items[position].choices[option.at]
    return _result(items, chosen, budget, objective, problem, relaxed)


def _search(problem: Knapsack, relaxed: Relaxed) -> Picks | None:
    """The best allocation that meets the budgets, of those found from the ends of the relaxation."""
    best: Picks | None = None
    for column in relaxed.columns[:STARTS]:
        found = improve(problem.groups, column.picks, relaxed.prices)
        if found is not None and (best is None or found.cost < best.cost):
            best = found
    return best


def _totals(chosen: Sequence[Choice]) -> Totals:
    loss, noise, memory = (math.fsum(amounts(choice)[k] for choice in chosen) for k in range(3))
    return Totals(math.fsum(choice.seconds for choice in chosen), loss, noise, memory)


def _slack(totals: Totals, budget: Budget) -> PerBudget:
    memory = None if budget.bytes is None else budget.bytes - totals.bytes
    return PerBudget(budget.loss - totals.loss, budget.noise - totals.noise, memory)


def _result(
    items: Sequence[Item],
    chosen: Sequence[Choice],
    budget: Budget,
    objective: Objective,
    problem: Knapsack,
    relaxed: Relaxed,
) -> Allocation:
    totals = _totals(chosen)
    reached = getattr(totals, objective)
    bound = min(problem.base + problem.spread * relaxed.bound, reached)
    x, y, z = (price * problem.spread / room for price, room in zip(relaxed.prices, problem.room, strict=True))
    return Allocation(
        objective=objective,
        choices=FrozenDict({item.name: choice for item, choice in zip(items, chosen, strict=True)}),
        totals=totals,
        multipliers=PerBudget(x, y, None if budget.bytes is None else z),
        slack=_slack(totals, budget),
        is_feasible=True,
        bound=bound,
        gap=(reached - bound) / abs(reached) if reached != bound else 0.0,
    )


def _infeasible(items: Sequence[Item], budget: Budget, objective: Objective) -> Allocation:
    chosen = [min(item.choices, key=lambda c: (c.loss, *amounts(c))) for item in items]
    totals = _totals(chosen)
    return Allocation(
        objective=objective,
        choices=FrozenDict({item.name: choice for item, choice in zip(items, chosen, strict=True)}),
        totals=totals,
        multipliers=PerBudget(0.0, 0.0, None if budget.bytes is None else 0.0),
        slack=_slack(totals, budget),
        is_feasible=False,
        bound=None,
        gap=None,
    )
