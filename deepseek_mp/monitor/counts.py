"""The values a report is made of: counts by phase, of an operation, and of a fallback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from deepseek_mp.precision import Reason

Phase = Literal["forward", "backward"]
CAST = "cast"
"""The name under which conversions between number formats are counted; their format is `to<-from`."""


@dataclass(frozen=True, slots=True)
class Count:
    """How often something ran in each phase."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: Count) -> Count:
        return Count(self.forward + other.forward, self.backward + other.backward)

    def to_json(self) -> dict[str, int]:
        return {"total": self.total, "forward": self.forward, "backward": self.backward}


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCount:
    """How often the operation `op` ran in `format` inside `layer` ('' is outside all submodules)."""

    layer: str
    op: str
    format: str
    count: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Fallback:
    """An operation inside a 16-bit autocast region that ran in a wider format, and why."""

    layer: str
    op: str
    phase: Phase
    format: str
    reason: Reason
    count: int

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "op": self.op,
            "phase": self.phase,
            "format": self.format,
            "reason": self.reason.value,
            "count": self.count,
        }
