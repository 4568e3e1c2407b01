"""Median and spread of measurements, and where among them a share of them ends."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The middle of some numbers, and what 80 % of them lie between."""

    median: float
    low: float
    """The 10th percentile."""
    high: float
    """The 90th percentile."""
    count: int

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the finite values among `values`; None if there are none."""
    finite = sorted(value for value in values if value is not None and math.isfinite(value))
    if not finite:
        return None
    return Spread(
        median=quantile(finite, 0.5), low=quantile(finite, 0.1), high=quantile(finite, 0.9), count=len(finite)
    )


def quantile(ordered: list[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, between two of them in proportion."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
