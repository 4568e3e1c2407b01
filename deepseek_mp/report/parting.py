"""Where two series of numbers by step part: first at all, first beyond a tolerance, at most, and at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LAST = 10
"""Shared steps averaged into the difference at the end: that of a single batch is noisy."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The values of both series at a step."""

    step: int
    a: float
    b: float

    @property
    def relative(self) -> float:
        """(b - a) / |a|: 0 for equal values, also for two NaN; infinite where only one is finite or a is 0."""
        return relative(self.a, self.b)

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "relative": self.relative}


@dataclass(frozen=True, kw_only=True)
class Parting:
    """How two series differ over the steps that both have; points are None where there is none."""

    compared: int
    """Steps that both have."""
    only_a: int
    only_b: int
    unequal: int
    """Compared steps whose values are not the same number."""
    beyond: int
    """Compared steps whose relative difference is more than the tolerance."""
    first_unequal: Point | None
    first_beyond: Point | None
    largest: Point | None
    """Where the relative difference is largest, if any is more than 0."""
    final: Point | None
    """Means of the last `LAST` compared steps, at the last of them."""

    def to_json(self) -> dict[str, Any]:
        return {name: value.to_json() if isinstance(value, Point) else value for name, value in vars(self).items()}


def part(a: Mapping[int, float], b: Mapping[int, float], tolerance: float) -> Parting:
    """Compare two series of step -> value."""
    points = [Point(step=step, a=a[step], b=b[step]) for step in sorted(a.keys() & b.keys())]
    unequal = [point for point in points if point.relative != 0]
    beyond = [point for point in unequal if abs(point.relative) > tolerance]
    return Parting(
        compared=len(points),
        only_a=len(a) - len(points),
        only_b=len(b) - len(points),
        unequal=len(unequal),
        beyond=len(beyond),
        first_unequal=next(iter(unequal), None),
        first_beyond=next(iter(beyond), None),
        largest=max(unequal, key=lambda point: abs(point.relative), default=None),
        final=_final(points[-LAST:]),
    )


def relative(a: float, b: float) -> float:
    """(b - a) / |a|; 0 for equal values, also for two NaN; infinite where only one is finite, or a is 0."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return (b - a) / abs(a) if a else math.copysign(math.inf, b)


def _final(points: Sequence[Point]) -> Point | None:
    if not points:
        return None
    count = len(points)
    return Point(step=points[-1].step, a=sum(p.a for p in points) / count, b=sum(p.b for p in points) / count)
