"""An allocation as values: choices with their predicted costs, budgets, and what was chosen at which prices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision.checks import shown
from deepseek_mp.precision.trade import BUDGETS, Trade, quantity

Objective = Literal["seconds", "bytes"]
TOLERANCE = 1e-9
"""A sum meets a budget when it exceeds it by no more than this part: sums are rounded, budgets are not that exact."""
LARGEST = 1e100
"""No cost is larger in size, so that no sum of them overflows."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run an item, with its predicted costs.

    `seconds` and `bytes` are what one step takes. `seconds` may be measured against some reference, and so
    negative. `loss` is the predicted relative rise of the loss: below 0 it counts as 0, and an infinite one is
    never chosen. `noise` is the variance that rounding adds to the gradient, relative to that of the batch;
    below 0 it counts as 0. `ConfigError` for NaN and any other infinite value.
    """

    name: str
    seconds: float
    loss: float
    noise: float
    bytes: float = 0.0

    def __post_init__(self) -> None:
        where = f"choice {shown(self.name)}"
        _check_name(where, self.name)
        _check_number(f"{where}: seconds", self.seconds)
        _check_number(f"{where}: noise", self.noise)
        _check_number(f"{where}: bytes", self.bytes, low=0.0)
        if self.loss != math.inf:
            _check_number(f"{where}: loss", self.loss, also=", or inf for 'never'")

    @property
    def amounts(self) -> tuple[float, float, float]:
        """What it takes of the three budgets."""
        return max(self.loss, 0.0), max(self.noise, 0.0), self.bytes


@dataclass(frozen=True)
class Item:
    """What gets one choice: a unit, or units that are tied, in one role. The first choice has the highest precision."""

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        names = [choice.name for choice in self.choices]
        where = f"item {shown(self.name)}"
        _check_name(where, self.name)
        if all(choice.loss == math.inf for choice in self.choices):
            passed = f"{where} has {len(names)} choices, none of finite loss"
            raise ConfigError(explain(passed, "one choice of finite loss or more", "Add the choice that is in use now"))
        _check_unique(f"{where}: choices", names)


@dataclass(frozen=True)
class Budget:
    """What the choices of all items may cost together: each limit is above 0 and finite; no `bytes` is no limit."""

    loss: float
    noise: float
    bytes: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("loss", self.loss), ("noise", self.noise), ("bytes", self.bytes)):
            if limit is not None or name != "bytes":
                _check_number(f"budget: {name}", limit, above=0.0)

    @property
    def limits(self) -> tuple[float, float, float]:
        """The three budgets; infinite where bytes have none."""
        return self.loss, self.noise, math.inf if self.bytes is None else self.bytes


@dataclass(frozen=True)
class Totals:
    """Sums over the chosen choices; `loss` and `noise` below 0 count as 0."""

    seconds: float
    loss: float
    noise: float
    bytes: float

    @property
    def amounts(self) -> tuple[float, float, float]:
        """What is taken of the three budgets."""
        return self.loss, self.noise, self.bytes


@dataclass(frozen=True)
class PerBudget:
    """One number for each budget; `bytes` is None where bytes have no budget."""

    loss: float
    noise: float
    bytes: float | None

    def or_else(self, default: float) -> tuple[float, float, float]:
        """The three numbers, with `default` for bytes without a budget."""
        return self.loss, self.noise, default if self.bytes is None else self.bytes


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One choice for each item, and how good it is.

    `choices` maps names of items to what was chosen, in the order of the items. `multipliers` are the prices of
    the relaxed problem: what the objective would fall by if a budget grew by one unit. `slack` is what is left of
    each budget, negative where it is exceeded. No allocation has an objective below `bound`; `gap` is the
    distance to it relative to the objective, 0 where the allocation is proven best. Both are None where no
    allocation was found that meets the budgets.
    """

    objective: Objective
    choices: Mapping[str, Choice] = field(hash=False)
    totals: Totals
    multipliers: PerBudget
    slack: PerBudget
    is_feasible: bool
    bound: float | None
    gap: float | None

    @property
    def exceeded(self) -> str:
        """The budgets that are exceeded and by how much, in words; empty when the allocation is feasible."""
        if self.is_feasible:
            return ""
        parts = [
            f"the {name} budget of {quantity(used + left, name)} is exceeded by {quantity(-left, name)}"
            for name, used, left in zip(BUDGETS, self.totals.amounts, self.slack.or_else(0.0), strict=True)
            if not meets(used, used + left)
        ]
        return " and ".join(parts)

    def explain(self, item: Item) -> str:
        """Why `item`, one of those given to `allocate`, has its choice: what the next best one saves and costs.

        The multipliers are the going rates. `ConfigError` for an item that is not part of this allocation.
        """
        chosen = self.choices.get(item.name)
        if chosen is None or chosen not in item.choices:
            passed = f"item {shown(item.name)} does not have the choice of this allocation, {shown(chosen)}"
            raise ConfigError(explain(passed, "the items given to allocate", "Pass the item itself"))
        if not self.is_feasible:
            return f"{chosen.name}: the choice of least loss; {self.exceeded}"
        return f"{chosen.name}: {self._reason(item, chosen)}"

    def _reason(self, item: Item, chosen: Choice) -> str:
        cheaper = [choice for choice in item.choices if self._trade(chosen, choice).saved > 0.0]
        possible = [choice for choice in cheaper if choice.loss != math.inf]
        if possible:
            other = max(possible, key=lambda choice: self._trade(chosen, choice).profit)
            trade = self._trade(chosen, other)
            return f"{other.name} would {trade}{self._lack(trade)}"
        if cheaper:
            saved = self._trade(chosen, cheaper[0]).saved
            return f"{cheaper[0].name} would save {quantity(saved, self.objective)}, but its loss is infinite"
        first = item.choices[0]
        least = "no choice takes less time" if self.objective == "seconds" else "no choice takes fewer bytes"
        gains = chosen != first and first.loss != math.inf and self._trade(first, chosen).saved > 0.0
        return f"taken instead of {first.name} to {self._trade(first, chosen)}; {least}" if gains else least

    def _trade(self, old: Choice, new: Choice) -> Trade:
        loss, noise, memory = (b - a for a, b in zip(old.amounts, new.amounts, strict=True))
        saved: float = getattr(old, self.objective) - getattr(new, self.objective)
        if self.slack.bytes is None:
            memory = 0.0  # Nothing is taken of a budget that there is not.
        rates = self.multipliers.or_else(0.0)
        return Trade(objective=self.objective, saved=saved, taken=(loss, noise, memory), rates=rates)

    def _lack(self, trade: Trade) -> str:
        """What keeps a trade from being made that is worth its price."""
        left = zip(BUDGETS, trade.taken, self.slack.or_else(math.inf), strict=True)
        lacking = [f"{quantity(max(has, 0.0), name)} of the {name} budget" for name, takes, has in left if takes > has]
        return f"; only {' and '.join(lacking)} is left" if lacking and trade.profit >= 0.0 else ""


def meets(total: float, limit: float) -> bool:
    """Whether a sum meets a budget."""
    return total <= limit * (1.0 + TOLERANCE)


def check_items(items: tuple[Item, ...]) -> None:
    """`ConfigError` for two items of one name."""
    _check_unique("items", [item.name for item in items])


def _check_unique(what: str, names: list[str]) -> None:
    if len(set(names)) == len(names):
        return
    twice = next(name for index, name in enumerate(names) if name in names[:index])
    raise ConfigError(explain(f"{what}: two are named {shown(twice)}", "names that differ", "Rename one of them"))


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str):
        raise ConfigError(explain(f"{what}: its name is of type {type(name).__name__}", "a string", "Pass str(name)"))


def _check_number(what: str, value: Any, *, low: float = -LARGEST, above: float = -math.inf, also: str = "") -> None:
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    if is_number and low <= value <= LARGEST and value > above:
        return
    range_ = f"above {above:g}" if above > -math.inf else f"from {low:g}"
    allowed = f"a number {range_} to {LARGEST:g}{also}"
    raise ConfigError(explain(f"{what} is {shown(value)}", allowed, "Pass a plain number, as float(x)"))
