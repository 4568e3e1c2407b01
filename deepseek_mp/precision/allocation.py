"""An allocation as values: choices with their predicted costs, budgets, and what was chosen at which prices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision.checks import shown

Objective = Literal["seconds", "bytes"]
LARGEST = 1e100
"""No cost is larger in size, so that no sum of them overflows."""


@dataclass(frozen=True)
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
        _check_number(f"{where}: seconds", self.seconds)
        _check_number(f"{where}: noise", self.noise)
        _check_number(f"{where}: bytes", self.bytes, low=0.0)
        if self.loss != math.inf:
            _check_number(f"{where}: loss", self.loss, also=", or inf for 'never'")


@dataclass(frozen=True)
class Item:
    """What gets one choice: a unit, or units that are tied, in one role. The first choice has the highest precision."""

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        names = [choice.name for choice in self.choices]
        where = f"item {shown(self.name)}"
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


@dataclass(frozen=True)
class Totals:
    """Sums over the chosen choices; `loss` and `noise` below 0 count as 0."""

    seconds: float
    loss: float
    noise: float
    bytes: float


@dataclass(frozen=True)
class PerBudget:
    """One number for each budget; `bytes` is None where bytes have no budget."""

    loss: float
    noise: float
    bytes: float | None


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


def check_items(items: tuple[Item, ...]) -> None:
    """`ConfigError` for two items of one name."""
    _check_unique("items", [item.name for item in items])


def _check_unique(what: str, names: list[str]) -> None:
    if len(set(names)) == len(names):
        return
    twice = next(name for index, name in enumerate(names) if name in names[:index])
    raise ConfigError(explain(f"{what}: two are named {shown(twice)}", "names that differ", "Rename one of them"))


def _check_number(what: str, value: Any, *, low: float = -LARGEST, above: float = -math.inf, also: str = "") -> None:
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    if is_number and low <= value <= LARGEST and value > above:
        return
    range_ = f"above {above:g}" if above > -math.inf else f"from {low:g}"
    allowed = f"a number {range_} to {LARGEST:g}{also}"
    raise ConfigError(explain(f"{what} is {shown(value)}", allowed, "Pass a plain number, as float(x)"))
