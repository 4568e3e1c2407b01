"""From an allocation near the best one to a good one that meets the budgets: repair, fill, swap.

All of it is in the scaled numbers of `knapsack`, where each budget is 1. A move gives one group another option.
Its price is what it changes the cost by, with its uses priced. At the prices of the relaxation no move from a
cheapest allocation has a price below 0, and moves of a low price are those that a best allocation may need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepseek_mp.precision.knapsack import Group, Option, Prices, sums

EPSILON = 1e-12
MOST_PASSES = 20
PAIRED_MOVES = 90
"""Moves that are tried two at a time: pairs grow with the square."""


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
    """An allocation that is changed move by move, with its sums."""

    def __init__(self, options: Sequence[Option]) -> None:
        self.options = list(options)
        self.settle()

    @property
    def fits(self) -> bool:
        return self.allows(0.0, 0.0, 0.0)

    def allows(self, loss: float, noise: float, memory: float) -> bool:
        """Whether the budgets are met with so much more used."""
        return self.loss + loss <= 1.0 and self.noise + noise <= 1.0 and self.bytes + memory <= 1.0

    def excess(self, loss: float = 0.0, noise: float = 0.0, memory: float = 0.0) -> float:
        """By how much the budgets are exceeded, summed, with so much more used."""
        loss += self.loss - 1.0
        noise += self.noise - 1.0
        memory += self.bytes - 1.0
        return (loss if loss > 0.0 else 0.0) + (noise if noise > 0.0 else 0.0) + (memory if memory > 0.0 else 0.0)

    def make(self, move: Move) -> None:
        self.options[move.group] = move.option
        self.cost += move.cost
        self.loss += move.loss
        self.noise += move.noise
        self.bytes += move.bytes

    def settle(self) -> None:
        """Sum again, so that the rounding of single moves does not add up."""
        self.cost, self.loss, self.noise, self.bytes = sums(self.options)


def moves(
    groups: Sequence[Group],
    picks: Picks,
    prices: Prices,
    wanted: Callable[[float, float, float, float], bool] | None = None,
) -> list[Move]:
    """The moves from an allocation; `wanted` is asked with the change of cost and uses."""
    x, y, z = prices
    found = []
    for index, (group, (cost, loss, noise, memory, at)) in enumerate(zip(groups, picks.options, strict=True)):
        for option in group:
            if option[4] != at:
                t, a, b, c = option[0] - cost, option[1] - loss, option[2] - noise, option[3] - memory
                if wanted is None or wanted(t, a, b, c):
                    found.append(Move(t + x * a + y * b + z * c, t, a, b, c, index, option))
    return found


def repair(groups: Sequence[Group], picks: Picks, prices: Prices) -> bool:
    """Make the moves that remove most excess for their price, until the budgets are met; False when none are left."""
    for _ in range(MOST_PASSES):
        if picks.fits or not _relieve(groups, picks, prices):
            break
    return picks.fits


def _relieve(groups: Sequence[Group], picks: Picks, prices: Prices) -> bool:
    """One pass of repair; False when it removed nothing."""
    before = now = picks.excess()
    useful = moves(groups, picks, prices, lambda _, *use: picks.excess(*use) < before - EPSILON)
    ranked = sorted((_rate(move, before - picks.excess(*move[2:5])), move) for move in useful)
    moved = set()
    for _, move in ranked:
        if move.group not in moved and picks.excess(*move[2:5]) < now - EPSILON:
            picks.make(move)
            moved.add(move.group)
            now = picks.excess()
            if not now:
                break
    picks.settle()
    return bool(moved)


def _rate(move: Move, gain: float) -> float:
    """What a move costs for the excess that it removes; moves without a price differ by what they remove."""
    return (max(move.price, 0.0) + EPSILON) / gain


def fill(groups: Sequence[Group], picks: Picks, prices: Prices) -> None:
    """Make the moves that save cost and fit, those of the lowest price first."""
    moved = {-1}
    while moved:
        moved = set()
        for move in sorted(moves(groups, picks, prices, lambda t, *use: t < -EPSILON and picks.allows(*use))):
            if move.group not in moved and picks.allows(*move[2:5]):
                picks.make(move)
                moved.add(move.group)
        picks.settle()


def swap(groups: Sequence[Group], picks: Picks, prices: Prices) -> bool:
    """Make the two moves that together save most cost and fit; False when there are none."""
    near = sorted(moves(groups, picks, prices))[:PAIRED_MOVES]
    loss, noise, memory = 1.0 - picks.loss, 1.0 - picks.noise, 1.0 - picks.bytes
    best, most = None, -EPSILON
    for i, one in enumerate(near):
        _, cost, a, b, c, group, _ = one
        for other in near[:i]:
            if (
                cost + other[1] < most
                and a + other[2] <= loss
                and b + other[3] <= noise
                and c + other[4] <= memory
                and group != other[5]
            ):
                best, most = (one, other), cost + other[1]
    if best is None:
        return False
    for move in best:
        picks.make(move)
    picks.settle()
    return True
