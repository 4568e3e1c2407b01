"""One choice in place of another as a trade: what it saves, what it costs, and whether that is dear, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

BUDGETS = ("loss", "noise", "bytes")
UNITS = {
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
}
PLAIN_FROM, PLAIN_TO = 1e-2, 1e3
"""Numbers outside are written with a power of ten."""


@dataclass(frozen=True, kw_only=True)
class Trade:
    """What one choice saves against another, and what it takes more of each budget, in the order of `BUDGETS`."""

    objective: str
    """'seconds' or 'bytes': what is saved."""
    saved: float
    taken: tuple[float, float, float]
    """Below 0 where it takes less."""
    rates: tuple[float, float, float]
    """The price of one unit of each budget, in units of what is saved."""

    @property
    def price(self) -> float:
        """What the budgets it takes are worth, less those that it gives back."""
        return math.fsum(rate * amount for rate, amount in zip(self.rates, self.taken, strict=True))

    @property
    def profit(self) -> float:
        """What it saves above its price; below 0 where it is too dear."""
        return self.saved - self.price

    def __str__(self) -> str:
        costs, going = [], []
        for name, amount, rate in zip(BUDGETS, self.taken, self.rates, strict=True):
            if amount <= 0.0:
                continue
            costs.append(f"{quantity(amount, name)} of the {name} budget")
            if rate > 0.0:
                unit = 10.0 ** math.floor(math.log10(amount))
                going.append(f"{quantity(rate * unit, self.objective)} per {quantity(unit, name)} of {name}")
        words = f"save {quantity(self.saved, self.objective)} and cost {' and '.join(costs) or 'nothing'}"
        if not going:
            return words
        rates = "rates" if len(going) > 1 else "rate"
        return f"{words}, {number(self.price / self.saved)} times the going {rates} of {' and '.join(going)}"


def quantity(value: float, kind: str) -> str:
    """A number with its unit: `kind` is 'seconds', 'bytes', or the name of a budget without a unit."""
    for size, unit in UNITS.get(kind, ()):
        if abs(value) >= size:
            return f"{number(value / size)} {unit}"
    return number(value)


def number(value: float) -> str:
    """A number of two or three digits, as 0.62, 5, 310 or 3.1e-4."""
    if value == 0.0 or PLAIN_FROM <= abs(value) < PLAIN_TO:
        return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"
