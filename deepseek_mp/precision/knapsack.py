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
    options = [_options(items[i].choices, objective, counts_bytes=budget.bytes is not None) for i in order]
    least = [tuple(map(min, zip(*group, strict=True))) for group in options]
    # Half of the tolerance is kept for the rounding of sums that are updated step by step.
    loss, noise, memory = (
        limit * (1.0 + TOLERANCE / 2) - math.fsum(low[k] for low in least)
        for k, limit in enumerate(budget.limits, start=1)
    )
    if min(loss, noise, memory) < 0.0:
        return None
    room = (loss, noise, memory)
    useful = [_useful(group, low, room) for group, low in zip(options, least, strict=True)]
    if not all(useful):
        return None
    spread = math.fsum(group[-1][0] - group[0][0] for group in useful) or 1.0
    return Knapsack(
        groups=[_scaled(group, low, spread, room) for group, low in zip(useful, least, strict=True)],
        order=order,
        base=math.fsum(group[0][0] for group in useful),
        spread=spread,
        room=room,
    )


def _options(choices: Sequence[Choice], objective: Objective, *, counts_bytes: bool) -> Group:
    """The choices that may be chosen, not yet scaled."""
    options = []
    for at, choice in enumerate(choices):
        if choice.loss != math.inf:
            loss, noise, memory = choice.amounts
            cost = choice.seconds if objective == "seconds" else choice.bytes
            options.append((cost, loss, noise, memory if counts_bytes else 0.0, at))
    return options


def _useful(group: Group, least: tuple[float, ...], room: Prices) -> Group:
    """The options by cost, less those that never fit and those that another one dominates."""
    most_loss, most_noise, most_bytes = (low + left for low, left in zip(least[1:4], room, strict=True))
    kept: Group = []
    for option in sorted(group):
        _, loss, noise, memory, _ = option
        if loss > most_loss or noise > most_noise or memory > most_bytes:
            continue
        for _, a, b, c, _ in kept:
            if a <= loss and b <= noise and c <= memory:
                break
        else:
            kept.append(option)
    return kept


def _scaled(group: Group, least: tuple[float, ...], spread: float, room: Prices) -> Group:
    """The options, sorted by cost, in units of the spread and of the room."""
    cheapest = group[0][0]
    _, low_loss, low_noise, low_bytes, _ = least
    # Without room there is nothing to scale: what still fits takes the least.
    loss_room, noise_room, bytes_room = (left or math.inf for left in room)
    return [
        (
            (cost - cheapest) / spread,
            (loss - low_loss) / loss_room,
            (noise - low_noise) / noise_room,
            (memory - low_bytes) / bytes_room,
            at,
        )
        for cost, loss, noise, memory, at in group
    ]
