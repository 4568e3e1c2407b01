"""The allocation problem in scaled numbers: groups of options, of which the useful ones remain.

An option's cost is its objective above the least of its group, divided by what all groups can vary by. Its
use of a budget is what it takes above the least of its group, divided by what is left of the budget when
every group takes its least. So costs and uses are at least 0, and each budget is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepseek_mp.precision.allocation import TOLERANCE, Budget, Choice, Item, Objective

Prices = tuple[float, float, float]
"""One number for each budget: loss, noise, bytes."""


Option = tuple[float, float, float, float, int]
"""A choice in scaled numbers: its cost, its uses of loss, noise and bytes, and its place among the item's choices.

A plain tuple, since a problem makes thousands: with names the time to build them would be seen.
"""
Group = list[Option]


@dataclass(frozen=True, kw_only=True)
class Knapsack:
    """Choose one option of each group: least sum of costs, and sums of uses of at most 1."""

    groups: list[Group]
    """One for each item, sorted by the items' names: so the order of the items changes nothing."""
    order: list[int]
    """The item that each group stands for."""
    base: float
    """The objective when every group takes its cheapest choice."""
    spread: float
    """The objective that one unit of cost stands for."""
    room: Prices
    """The amount of each budget that one unit of use stands for; infinite where there is no budget."""


def priced(option: Option, prices: Prices) -> float:
    """An option's cost with its uses priced."""
    return option[0] + prices[0] * option[1] + prices[1] * option[2] + prices[2] * option[3]


def sums(options: Iterable[Option]) -> tuple[float, float, float, float]:
    """The cost and the uses of an allocation."""
    cost, loss, noise, memory, _ = map(math.fsum, tuple(zip(*options, strict=True)) or ((),) * 5)
    return cost, loss, noise, memory


def build(items: Sequence[Item], budget: Budget, objective: Objective) -> Knapsack | None:
    """The problem without the options that no best allocation needs; None where it is plain that none fits."""
    order = sorted(range(len(items)), key=lambda i: items[i].name)
    groups = [_options(items[i].choices, objective) for i in order]
    least = [tuple(map(min, zip(*group, strict=True))) for group in groups]
    base, loss, noise, memory = (math.fsum(low[k] for low in least) for k in range(4))
    # Half of the tolerance is kept for the rounding of sums that are updated step by step.
    loss, noise, memory = (
        limit * (1.0 + TOLERANCE / 2) - used for limit, used in zip(budget.limits, (loss, noise, memory), strict=True)
    )
    if min(loss, noise, memory) < 0.0:
        return None
    spread = math.fsum(max(group)[0] - low[0] for group, low in zip(groups, least, strict=True)) or 1.0
    room = (loss, noise, memory)
    scaled = [_scaled(group, low, spread, room) for group, low in zip(groups, least, strict=True)]
    if not all(scaled):
        return None
    return Knapsack(groups=scaled, order=order, base=base, spread=spread, room=room)


def _options(choices: Sequence[Choice], objective: Objective) -> Group:
    """The choices that may be chosen, not yet scaled."""
    by_bytes = objective == "bytes"
    return [
        (choice.bytes if by_bytes else choice.seconds, *choice.amounts, at)
        for at, choice in enumerate(choices)
        if choice.loss != math.inf
    ]


def _scaled(group: Group, least: tuple[float, ...], spread: float, room: Prices) -> Group:
    """The options scaled and sorted by cost, less those that never fit and those that another one dominates."""
    cost0, loss0, noise0, bytes0, _ = least
    loss_room, noise_room, bytes_room = room
    kept: Group = []
    for cost, loss, noise, memory, at in sorted(group):
        loss -= loss0
        noise -= noise0
        memory -= bytes0
        if loss > loss_room or noise > noise_room or memory > bytes_room:
            continue
        # Where no room is left, what remains takes none.
        loss = loss / loss_room if loss else 0.0
        noise = noise / noise_room if noise else 0.0
        memory = memory / bytes_room if memory else 0.0
        for _, a, b, c, _ in kept:
            if a <= loss and b <= noise and c <= memory:
                break
        else:
            kept.append(((cost - cost0) / spread, loss, noise, memory, at))
    return kept
