"""What was done so that a step fits into memory: each measure with what it saves, what it costs, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepseek_mp.controller.memory_choice import Chosen, Measure, Weighed
from deepseek_mp.errors import ConfigError, explain

GIB = 1 << 30
AUTO_SHARE = 0.95
"""Share of the memory that is there which 'auto' fits a step into: allocators leave gaps."""


def limit_of(asked: float | str, available: int | None) -> int:
    """The most bytes that a step may hold.

    Args:
        asked: 'auto', or GiB.
        available: what the process may hold on its device; None where nobody knows.

    Raises:
        ConfigError: 'auto' on a device that does not say what it has.
    """
    if asked != "auto":
        return round(float(asked) * GIB)
    if available is None:
        change = "Pass a number of GiB"
        raise ConfigError(explain("memory='auto' on a device that does not say what it has", "a number there", change))
    return round(AUTO_SHARE * available)


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    """One measure."""

    name: str
    taken: bool
    why: str
    saved_bytes: int | None = None
    """In the whole step, beside the measure that it builds on; None where it was not tried."""
    extra_seconds: float | None = None
    """Of a step, likewise."""

    def __str__(self) -> str:
        found = [self.why]
        if self.saved_bytes is not None and self.extra_seconds is not None:
            change = f"{in_gib(abs(self.saved_bytes))} {'more' if self.saved_bytes < 0 else 'less'}"
            found.append(f"alone {change} and {1e3 * self.extra_seconds:+.3g} ms")
        return f"{'taken' if self.taken else 'left'} {self.name}: {'; '.join(filter(None, found))}"


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """How a training step was made to fit."""

    limit_bytes: int
    before_bytes: int | None
    """The most memory in tensors during a step as it was; None: the device's did not suffice."""
    after_bytes: int
    """With what was taken."""
    slowdown: float | None = None
    """Time of a step over that of a step as it was; None where nothing was taken, or one of them could not be timed."""
    samples: int = 0
    """Of the batch."""
    timed_samples: int = 0
    """Of the part of it that measures were weighed on."""
    lines: tuple[MemoryLine, ...] = ()

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of the measures in force."""
        return tuple(line.name for line in self.lines if line.taken)

    @property
    def summary(self) -> str:
        """The outcome in one line."""
        before = "more than there is" if self.before_bytes is None else in_gib(self.before_bytes)
        held = f"a step holds {in_gib(self.after_bytes)} of {in_gib(self.limit_bytes)}"
        if not self.taken:
            return f"{held}; nothing had to be done"
        slower = "" if self.slowdown is None else f", and {self.slowdown:.2f} times the time"
        return f"{held} with {', '.join(self.taken)}; as it was, {before}{slower}"

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {line}" for line in self.lines)])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "lines": [asdict(line) for line in self.lines]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryReport:
        """What `to_json` wrote."""
        return cls(**{**data, "lines": tuple(MemoryLine(**line) for line in data["lines"])})


def lines_of(order: tuple[Weighed, ...], chosen: Chosen, refused: Mapping[str, str]) -> tuple[MemoryLine, ...]:
    """A line for each measure: those taken in order, those that were weighed, those that were not possible.

    Of several steps along one way the furthest is taken, with what they save together.
    """
    weighed = {one.measure.name: one for one in order}
    passed = {measure.after for measure in chosen.taken}
    last = [measure for measure in chosen.taken if measure.name not in passed]
    taken = tuple(_line(_along(weighed, measure), _why_taken(weighed[measure.name]), taken=True) for measure in last)
    rest = [one for one in order if one.measure not in chosen.taken]
    left = tuple(_line(one, _why_left(one, chosen), taken=False) for one in rest)
    return (*taken, *left, *(MemoryLine(name=name, taken=False, why=why) for name, why in refused.items()))


def _along(weighed: Mapping[str, Weighed], measure: Measure) -> Weighed:
    """The measure, with what it and those that it builds on save and cost together."""
    one = weighed[measure.name]
    if measure.after not in weighed:
        return one
    before = _along(weighed, weighed[measure.after].measure)
    known = None not in (one.saved_bytes, before.saved_bytes, one.extra_seconds, before.extra_seconds)
    return replace(
        one,
        saved_bytes=(one.saved_bytes or 0) + (before.saved_bytes or 0) if known else None,
        extra_seconds=(one.extra_seconds or 0.0) + (before.extra_seconds or 0.0) if known else None,
    )


def _line(one: Weighed, why: str, *, taken: bool) -> MemoryLine:
    return MemoryLine(
        name=one.measure.name, taken=taken, why=why, saved_bytes=one.saved_bytes, extra_seconds=one.extra_seconds
    )


def _why_taken(one: Weighed) -> str:
    if math.isinf(one.cost):
        return "needed beside the others"
    return "costs no time that can be measured" if not one.cost else f"{one.cost * 1e3 * GIB:.3g} ms for each GiB"


def _why_left(one: Weighed, chosen: Chosen) -> str:
    if one.measure in chosen.needless:
        return "the step fits without it"
    if one.saved_bytes is not None and one.saved_bytes <= 0:
        return "it saves nothing alone, and others suffice"
    return "others that cost less for each byte suffice"


def in_gib(count: int) -> str:
    """Bytes in GiB, or MiB where they are few."""
    return f"{count / GIB:.3g} GiB" if abs(count) >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def gib_for(count: int) -> float:
    """A budget in GiB that so many bytes fit into, in thousandths."""
    return -(-1000 * count // GIB) / 1000
