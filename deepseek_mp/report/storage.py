"""Where two runs store weights in different formats at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_mp.report.layers import Choice
from deepseek_mp.report.products import ABSENT


@dataclass(frozen=True, kw_only=True)
class StorageDifference:
    """A parameter and how each run stores it; None where the run decided nothing, so that it is as it began."""

    parameter: str
    a: Choice | None
    b: Choice | None

    @property
    def formats(self) -> tuple[str, str]:
        """The format in A and in B."""
        a, b = (ABSENT if choice is None else choice.new for choice in (self.a, self.b))
        return a, b

    def to_json(self) -> dict[str, Any]:
        a, b = (None if choice is None else choice.to_json() for choice in (self.a, self.b))
        return {"parameter": self.parameter, "a": a, "b": b}


def compare_storage(a: Sequence[Choice], b: Sequence[Choice]) -> tuple[StorageDifference, ...]:
    """The parameters whose storage at the end differs, in the order of the runs' decisions."""
    here, there = ({choice.layer: choice for choice in run} for run in (a, b))
    found = [
        StorageDifference(parameter=name, a=here.get(name), b=there.get(name))
        for name in dict.fromkeys([*here, *there])
    ]
    return tuple(difference for difference in found if difference.formats[0] != difference.formats[1])
