"""Chooses one choice for each item: the least time or memory within budgets of loss, noise and memory.

This is a multiple-choice knapsack with up to three budgets (Kellerer, Pferschy and Pisinger, *Knapsack Problems*,
2004, chapter 11). Relaxing the budgets gives a bound and prices; the allocations near that bound are repaired,
filled and improved by swaps. What is then left open is searched, where it is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

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
    meets,
)
from deepseek_mp.precision.checks import shown
from deepseek_mp.precision.evidence import FrozenDict
from deepseek_mp.precision.knapsack import Knapsack, Prices, build
from deepseek_mp.precision.solve import Solution, solve


def allocate(items: Sequence[Item], budget: Budget, objective: Objective = "seconds") -> Allocation:
    """The choices of least `objective` whose loss, noise and bytes meet the budget.

    The result does not depend on the order of the items, and of equal choices the earlier one is taken. It is
    best where its `gap` is 0, and otherwise above the best by no more than that: so a larger budget may give an
    objective that is worse by its gap, but not more. When the first choices of all items meet the budget, so does the
    result. Where no allocation is found that does, `is_feasible` is False and every item has its choice of
    least loss.

    Sums meet a budget to nine digits. `ConfigError` for two items of one name and for an unknown objective.
    """
    items = tuple(items)
    check_items(items)
    if objective not in get_args(Objective):
        raise ConfigError(explain(f"objective is {shown(objective)}", "'seconds', 'bytes'", "Use one of these names"))
    problem = build(items, budget, objective)
    solution = None if problem is None else solve(problem)
    if problem is None or solution is None:
        return _result(items, _safest(items, budget), budget, objective)
    chosen = [item.choices[0] for item in items]
    for position, option in zip(problem.order, solution.options, strict=True):
        chosen[position] = items[position].choices[option[-1]]
    return _result(items, chosen, budget, objective, (problem, solution))


def _safest(items: Sequence[Item], budget: Budget) -> list[Choice]:
    """The first choices if they meet the budget, else those of least loss."""
    first = [item.choices[0] for item in items]
    if _meets(_totals(first), budget):
        return first
    return [min(item.choices, key=lambda choice: choice.amounts) for item in items]


def _totals(chosen: Sequence[Choice]) -> Totals:
    loss, noise, memory = (math.fsum(choice.amounts[k] for choice in chosen) for k in range(3))
    return Totals(math.fsum(choice.seconds for choice in chosen), loss, noise, memory)


def _meets(totals: Totals, budget: Budget) -> bool:
    return all(map(meets, totals.amounts, budget.limits))


def _result(
    items: Sequence[Item],
    chosen: Sequence[Choice],
    budget: Budget,
    objective: Objective,
    solved: tuple[Knapsack, Solution] | None = None,
) -> Allocation:
    """The allocation in the units of the items, with the bound and the prices of the solution, if there is one."""
    totals = _totals(chosen)
    reached: float = getattr(totals, objective)
    prices, bound, gap = (0.0, 0.0, 0.0), None, None
    if solved is not None:
        prices, bound, gap = _quality(*solved, reached)
    limited = budget.bytes is not None
    return Allocation(
        objective=objective,
        choices=FrozenDict({item.name: choice for item, choice in zip(items, chosen, strict=True)}),
        totals=totals,
        multipliers=PerBudget(prices[0], prices[1], prices[2] if limited else None),
        slack=PerBudget(
            budget.loss - totals.loss,
            budget.noise - totals.noise,
            None if budget.bytes is None else budget.bytes - totals.bytes,
        ),
        is_feasible=_meets(totals, budget),
        bound=bound,
        gap=gap,
    )


def _quality(problem: Knapsack, solution: Solution, reached: float) -> tuple[Prices, float, float]:
    """The prices of one unit of each budget, the bound, and the gap to it."""
    x, y, z = (
        price * problem.spread / room if room > 0.0 else 0.0
        for price, room in zip(solution.prices, problem.room, strict=True)
    )
    bound = reached if solution.is_proven else min(problem.base + problem.spread * solution.bound, reached)
    gap = 0.0 if bound == reached else (reached - bound) / max(abs(reached), abs(bound))
    return (x, y, z), bound, gap
