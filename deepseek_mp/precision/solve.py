"""Solves the scaled problem: relax, then improve what the relaxation met, then search what is left open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_mp.precision.branching import Search
from deepseek_mp.precision.improve import Picks, fill, repair, swap
from deepseek_mp.precision.knapsack import Group, Knapsack, Option, Prices, priced
from deepseek_mp.precision.relaxation import Relaxed, relax

EPSILON = 1e-12
PRECISION = 2e-4
"""Of the bound, relative to the objective."""
CLOSE = 5e-4
"""A gap so narrow that nothing more is tried."""
STARTS, MOST_STARTS = 3, 8
"""Allocations of the relaxation that are repaired and filled; the best of them goes on. More only while none can be."""
MOST_SWAPS = 40
WIDE_GAP = 5e-3
"""A gap that is worth a search, which first looks for an allocation that closes it."""
FEW_GROUPS, MOST_GROUPS = 30, 100
"""So few open groups are searched whatever the gap; more than the second are not searched."""
NODES = 10_000


@dataclass(frozen=True)
class Solution:
    """One option for each group, and what bounds its cost, in scaled numbers."""

    options: Sequence[Option]
    bound: float
    """No allocation that meets the budgets costs less."""
    prices: Prices
    is_proven: bool
    """Whether none costs less than this one."""


def solve(problem: Knapsack) -> Solution | None:
    """A solution at or near the least cost; None when none was found that meets the budgets."""
    base = problem.base / problem.spread
    relaxed = relax(problem.groups, PRECISION, base)
    if relaxed.is_infeasible:
        return None
    close = CLOSE * abs(base + relaxed.bound)
    best = _start(problem.groups, relaxed, close)
    groups = problem.groups
    if best is not None:
        groups = _open(groups, best, relaxed.prices, relaxed.bound)
        for _ in range(MOST_SWAPS):
            if best.cost - relaxed.bound <= close or not swap(groups, best, relaxed.prices):
                break
        groups = _open(groups, best, relaxed.prices, relaxed.bound)
    return _searched(groups, best, relaxed, base)


def _start(groups: Sequence[Group], relaxed: Relaxed, close: float) -> Picks | None:
    """The best of the first allocations after repair and fill, or the first of the others that can be repaired."""
    best: Picks | None = None
    for tried, column in enumerate(relaxed.columns[:MOST_STARTS]):
        if best is not None and (tried >= STARTS or best.cost - relaxed.bound <= close):
            break
        picks = Picks(column.picks)
        if repair(groups, picks, relaxed.prices):
            fill(groups, picks, relaxed.prices)
            if best is None or picks.cost < best.cost - EPSILON:
                best = picks
    return best


def _open(groups: Sequence[Group], best: Picks, prices: Prices, bound: float) -> list[Group]:
    """The groups with the options that a cheaper allocation may have.

    One with a priced cost above the least of its group by `d` is part of no allocation cheaper than `bound + d`.
    """
    most = best.cost - bound + EPSILON
    left = []
    for group in groups:
        values = [priced(option, prices) for option in group]
        limit = min(values) + most
        left.append([option for option, value in zip(group, values, strict=True) if value <= limit])
    return left


def _searched(groups: Sequence[Group], best: Picks | None, relaxed: Relaxed, base: float) -> Solution | None:
    """The solution after a search, if the problem is small enough and the gap wide enough for one."""
    bound = relaxed.bound
    options = None if best is None else best.options
    cost = math.inf if best is None else best.cost
    number = sum(len(group) > 1 for group in groups)
    wide = WIDE_GAP * abs(base + cost)
    if cost - bound > EPSILON and (number <= FEW_GROUPS or (number <= MOST_GROUPS and cost - bound >= wide)):
        search = Search(groups, relaxed.prices, options, NODES)
        for tolerance in (0.8 * WIDE_GAP * abs(base + bound), 0.0):
            if not search.run(tolerance):
                break
            bound = max(bound, search.cost - tolerance)
        options, cost = search.best, search.cost
    if options is None:
        return None
    return Solution(options, bound, relaxed.prices, is_proven=cost - bound <= EPSILON)
