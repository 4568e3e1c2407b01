"""The Lagrangian relaxation: prices of the budgets, a bound on the objective, and allocations near the best one.

With a price on each budget, every group chooses alone: the option whose cost and priced uses are least. The sum
of these, less the prices of the whole budgets, bounds the cost of every allocation that meets the budgets
(Everett, Operations Research 11, 1963). The prices with the highest bound are found by generating columns
(Dantzig and Wolfe, Operations Research 8, 1960): a small linear program mixes the allocations met so far and
gives the next prices. Its rows are the three budgets and the sum of the weights, so it takes microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_mp.precision.knapsack import Group, Option, Prices, sums

ROWS = 4
EPSILON = 1e-11
PENALTY = 1e4
"""Cost of exceeding all budgets by their own size, while no mix of allocations meets them; prices sum to no more."""
MOST_COST = 1.0 + 1e-6
"""No allocation costs more than 1, so a bound above shows that none meets the budgets."""
MOST_ROUNDS = 150
CAUTION = 0.3
"""Part of a step that is not made."""


@dataclass(frozen=True)
class Column:
    """An allocation, or an artificial column, as the linear program sees it."""

    cost: float
    rows: tuple[float, float, float, float]
    """The uses of the budgets, and 1 for an allocation."""
    picks: tuple[Option, ...] = ()


SLACKS = tuple(Column(0.0, tuple(float(i == k) for i in range(ROWS))) for k in range(ROWS - 1))  # type: ignore[arg-type]
VIOLATION = Column(PENALTY, (-1.0, -1.0, -1.0, 0.0))


@dataclass(frozen=True)
class Relaxed:
    """The relaxation solved."""

    prices: Prices
    bound: float
    """No allocation that meets the budgets costs less."""
    columns: tuple[Column, ...]
    """The allocations that were met, those of the final mix first."""

    @property
    def is_infeasible(self) -> bool:
        """Whether no allocation can meet the budgets; when not, there may be none still."""
        return self.bound > MOST_COST


def relax(groups: Sequence[Group], precision: float, base: float) -> Relaxed:
    """The highest bound, to within `precision` relative to the cost with `base` added."""
    best = prices = (0.0, 0.0, 0.0)
    column = cheapest(groups, prices)
    bound = column.cost
    master = Master(column)
    for _ in range(MOST_ROUNDS):
        prices, value = master.solve()
        if value - bound <= precision * abs(base + bound) + EPSILON or bound > MOST_COST:
            break
        # Prices of few columns jump about: a step towards them from the best so far converges sooner.
        x, y, z = ((1.0 - CAUTION) * there + CAUTION * here for there, here in zip(prices, best, strict=True))
        column = cheapest(groups, (x, y, z))
        reached = column.cost + math.fsum(p * (u - 1.0) for p, u in zip((x, y, z), column.rows, strict=False))
        if reached > bound:
            best, bound = (x, y, z), reached
        master.add(column)
    return Relaxed(best, bound, master.columns())


def cheapest(groups: Sequence[Group], prices: Prices) -> Column:
    """The allocation of least cost at these prices; the first of equal options."""
    x, y, z = prices
    picks = []
    for group in groups:
        values = [cost + x * loss + y * noise + z * memory for cost, loss, noise, memory, _ in group]
        picks.append(group[values.index(min(values))])
    cost, *uses = sums(picks)
    return Column(cost, (uses[0], uses[1], uses[2], 1.0), tuple(picks))


class Master:
    """The linear program over the columns so far: the cheapest mix of allocations that meets the budgets.

    A revised simplex. It starts from one allocation, with the column that allows a violation where that
    allocation exceeds a budget.
    """

    def __init__(self, first: Column) -> None:
        self._pool = [*SLACKS, VIOLATION, first]
        self._basis = [*SLACKS, first]
        self._inverse = [[float(i == k) for k in range(ROWS)] for i in range(ROWS)]
        for k in range(ROWS - 1):
            self._inverse[k][-1] = -first.rows[k]
        self._weights = [1.0 - use for use in first.rows[:-1]] + [1.0]
        worst = min(range(ROWS), key=self._weights.__getitem__)
        if self._weights[worst] < 0.0:
            self._pivot(VIOLATION, self._direction(VIOLATION), worst)

    def add(self, column: Column) -> None:
        self._pool.append(column)

    def solve(self) -> tuple[Prices, float]:
        """The prices at the optimum over the columns so far, and its cost."""
        for _ in range(MOST_ROUNDS):
            dual = [
                math.fsum(c.cost * row[k] for c, row in zip(self._basis, self._inverse, strict=True))
                for k in range(ROWS)
            ]
            a, b, c, d = dual
            reduced = [
                column.cost - a * column.rows[0] - b * column.rows[1] - c * column.rows[2] - d * column.rows[3]
                for column in self._pool
            ]
            lowest = min(reduced)
            entering = self._pool[reduced.index(lowest)]
            if lowest > -EPSILON or not self._enter(entering):
                break
        return (max(0.0, -a), max(0.0, -b), max(0.0, -c)), a + b + c + d

    def columns(self) -> tuple[Column, ...]:
        """The allocations: those of the mix, heaviest first, then the others, latest first."""
        mix = sorted(range(ROWS), key=lambda i: -self._weights[i])
        used = [self._basis[i] for i in mix if self._basis[i].picks]
        return (*used, *(c for c in reversed(self._pool) if c.picks and all(c is not u for u in used)))

    def _enter(self, column: Column) -> bool:
        direction = self._direction(column)
        ratios = [w / d if d > EPSILON else math.inf for w, d in zip(self._weights, direction, strict=True)]
        leaving = ratios.index(min(ratios))
        if ratios[leaving] == math.inf or self._basis[leaving] is column:
            return False
        self._pivot(column, direction, leaving)
        return True

    def _direction(self, column: Column) -> list[float]:
        return [math.fsum(r * v for r, v in zip(row, column.rows, strict=True)) for row in self._inverse]

    def _pivot(self, column: Column, direction: list[float], leaving: int) -> None:
        """Put `column` in the basis, in place of the one at `leaving`."""
        self._basis[leaving] = column
        row = [value / direction[leaving] for value in self._inverse[leaving]]
        weight = self._weights[leaving] / direction[leaving]
        for i in range(ROWS):
            if i == leaving:
                self._inverse[i], self._weights[i] = row, weight
            else:
                self._inverse[i] = [v - direction[i] * r for v, r in zip(self._inverse[i], row, strict=True)]
                self._weights[i] -= direction[i] * weight
