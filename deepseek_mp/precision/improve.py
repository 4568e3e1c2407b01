"""From an allocation near the best one to a good one that meets the budgets: repair, fill, swap.

All of it is in the scaled numbers of `knapsack`, where each budget is 1. A move gives one group another option.
Its price is what it changes the cost by, with its uses priced: at the prices of the relaxation no move from a
cheapest allocation has a price below 0, and moves of a low price are those that a best allocation may need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from deepseek_mp.precision.knapsack import Group, Option, Prices

EPSILON = 1e-12
PAIRED_MOVES = 90
"""Moves that are tried two at a time: pairs grow with the square."""
MOST_SWAPS = 40


class Move(NamedTuple):
    """What changes when one group takes another option."""

    price: float
    cost: float
    loss: float
    noise: float
    bytes: float
    group: int
    option: Option


class Picks:
    """An allocation that is changed step by step, with its sums."""

    def __init__(self, picks: Sequence[Option]) -> None:
        self.options = list(picks)
        self.cost, self.loss, self.noise, self.bytes = sums(picks)

    @property
    def fits(self) -> bool:
        return self.loss <= 1.0 and self.noise <= 1.0 and self.bytes <= 1.0

    @property
    def excess(self) -> float:
        """By how much the budgets are exceeded, summed."""
        return max(self.loss - 1.0, 0.0) + max(self.noise - 1.0, 0.0) + max(self.bytes - 1.0, 0.0)

    def allows(self, move: Move) -> bool:
        """Whether the budgets are met after the move."""
        return self.loss + move.loss <= 1.0 and self.noise + move.noise <= 1.0 and self.bytes + move.bytes <= 1.0

    def make(self, move: Move) -> None:
        self.options[move.group] = move.option
        self.cost += move.cost
        self.loss += move.loss
        self.noise += move.noise
        self.bytes += move.bytes

    def settle(self) -> None:
        """Sum again, so that rounding does not add up."""
        self.cost, self.loss, self.noise, self.bytes = sums(self.options)


def sums(picks: Sequence[Option]) -> tuple[float, float, float, float]:
    """The cost and the uses of an allocation."""
    if not picks:
        return 0.0, 0.0, 0.0, 0.0
    cost, loss, noise, memory, _ = map(math.fsum, zip(*picks, strict=True))
    return cost, loss, noise, memory


def improve(groups: Sequence[Group], start: Sequence[Option], prices: Prices) -> Picks | None:
    """An allocation that meets the budgets, near `start`; None when repair finds none."""
    picks = Picks(start)
    if not repair(groups, picks, prices):
        return None
    fill(groups, picks, prices)
    for _ in range(MOST_SWAPS):
        if not swap(groups, picks, prices):
            break
    picks.settle()
    return picks


def moves(groups: Sequence[Group], picks: Picks, prices: Prices) -> list[Move]:
    """Every move from an allocation."""
    x, y, z = prices
    found = []
    for index, (group, now) in enumerate(zip(groups, picks.options, strict=True)):
        cost, loss, noise, memory, at = now
        for option in group:
            if option[4] != at:
                t, a, b, c = option[0] - cost, option[1] - loss, option[2] - noise, option[3] - memory
                found.append(Move(t + x * a + y * b + z * c, t, a, b, c, index, option))
    return found


def repair(groups: Sequence[Group], picks: Picks, prices: Prices) -> bool:
    """Take the moves that remove most excess for their price, until the budgets are met."""
    while not picks.fits:
        before = picks.excess
        best, best_rate = None, math.inf
        for move in moves(groups, picks, prices):
            gain = before - (
                max(picks.loss + move.loss - 1.0, 0.0)
                + max(picks.noise + move.noise - 1.0, 0.0)
                + max(picks.bytes + move.bytes - 1.0, 0.0)
            )
            if gain > EPSILON:
                rate = (max(move.price, 0.0) + EPSILON) / gain
                if rate < best_rate:
                    best, best_rate = move, rate
        if best is None:
            return False
        picks.make(best)
        picks.settle()
    return True


def fill(groups: Sequence[Group], picks: Picks, prices: Prices) -> None:
    """Take the moves that save cost and still fit, those of the lowest price first."""
    while True:
        saving = sorted(move for move in moves(groups, picks, prices) if move.cost < -EPSILON and picks.allows(move))
        if not saving:
            return
        moved = set()
        for move in saving:
            if move.group not in moved and picks.allows(move):
                picks.make(move)
                moved.add(move.group)


def swap(groups: Sequence[Group], picks: Picks, prices: Prices) -> bool:
    """Make the two moves together that save most cost and fit; False when there are none."""
    near = sorted(moves(groups, picks, prices))[:PAIRED_MOVES]
    loss, noise, memory = 1.0 - picks.loss, 1.0 - picks.noise, 1.0 - picks.bytes
    best, most = None, -EPSILON
    for i, one in enumerate(near):
        _, cost, a, b, c, group, _ = one
        for other in near[:i]:
            total = cost + other[1]
            if (
                total < most
                and a + other[2] <= loss
                and b + other[3] <= noise
                and c + other[4] <= memory
                and group != other[5]
            ):
                best, most = (one, other), total
    if best is None:
        return False
    for move in best:
        picks.make(move)
    return True
