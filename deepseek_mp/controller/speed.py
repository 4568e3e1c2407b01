"""`SpeedCheck`: what a change of the plan did to the step's time, against what the layers' timings promised.

Layers are timed alone. Whether a step gets faster by as much depends on the rest: where the host cannot launch fast
enough, or a compiler had fused what a lower recipe adds, it gets less, or slower. So steps are timed before and after.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from deepseek_mp.controller.adaptive_units import AdaptiveUnit
from deepseek_mp.controller.trend import NORMAL_MAD
from deepseek_mp.precision import Decision, Reason

WINDOW = 24
"""Steps that a time is the median of."""
SETTLING = 6
"""Steps after a change that do not count: code is compiled, kernels are loaded."""
LEAST = 0.02
"""Change of the promised saving, relative to the step, that can be seen at all."""
DOUBT = 3.0
"""Standard errors by which the promise must exceed what the two medians scatter by."""
_OF_MEDIAN = 1.2533


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step under one plan, in seconds: the median, its standard error, and what layers' timings say it saves."""

    seconds: float
    error: float
    promised: float

    @classmethod
    def of(cls, samples: Sequence[float], promised: float) -> StepTime:
        """The time of these steps."""
        middle = median(samples)
        sigma = NORMAL_MAD * median(abs(sample - middle) for sample in samples)
        return cls(seconds=middle, error=_OF_MEDIAN * sigma / math.sqrt(len(samples)), promised=promised)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Two plans' steps, one after the other."""

    before: StepTime
    after: StepTime

    @property
    def kept(self) -> float:
        """How much of the promised saving the step showed: 1 all of it, 0 nothing, below 0 it went the other way."""
        promised = self.after.promised - self.before.promised
        return (self.before.seconds - self.after.seconds) / promised

    @property
    def evidence(self) -> dict[str, Any]:
        promised = self.after.promised - self.before.promised
        return {
            "before_ms": 1e3 * self.before.seconds,
            "after_ms": 1e3 * self.after.seconds,
            "promised_ms": 1e3 * promised,
            "saved_ms": 1e3 * (self.before.seconds - self.after.seconds),
            "steps": WINDOW,
        }

    def decision(self, base: str, step: int) -> Decision:
        """As a record of the run, about no layer of its own."""
        evidence = {**self.evidence, "kept": self.kept, "step": step}
        return Decision(
            layer="",
            old=base,
            new=base,
            reason=Reason.MEASURED_FASTEST if self.kept > 0 else Reason.MEASURED_SLOWER,
            detail=f"a step takes {evidence['after_ms']:.2f} ms, {evidence['before_ms']:.2f} before the change; "
            f"the layers' timings promised {evidence['promised_ms']:.2f} less",
            evidence=evidence,
        )


class SpeedCheck:
    """Fed each step's time and what the plan in force promises to save. A window with a change in it is dropped."""

    def __init__(self) -> None:
        self.last: StepTime | None = None
        """Of the last full window."""
        self.switch = 0.0
        """Seconds that the steps right after the last change took more than others: compiling, above all."""
        self._samples: list[float] = []
        self._promised = math.nan
        self._settling = 0

    def see(self, seconds: float, promised: float) -> Gain | None:
        """Take a step's time in seconds. What the change before it did, once a window is full and that can be told."""
        if promised != self._promised:
            self._promised, self._samples = promised, []
            self._settling = SETTLING
            self.switch = 0.0
        if self._settling:
            self._settling -= 1
            self.switch += 0.0 if self.last is None else max(0.0, seconds - self.last.seconds)
            return None
        self._samples.append(seconds)
        if len(self._samples) < WINDOW:
            return None
        before, self.last = self.last, StepTime.of(self._samples, promised)
        self._samples = []
        return None if before is None else _gain(before, self.last)


def _gain(before: StepTime, after: StepTime) -> Gain | None:
    promised = abs(after.promised - before.promised)
    if promised < max(LEAST * before.seconds, DOUBT * math.hypot(before.error, after.error)):
        return None
    return Gain(before=before, after=after)


def compiled_with(units: Mapping[str, AdaptiveUnit], names: Collection[str], among: Iterable[str]) -> list[str]:
    """Others among these in the blocks of `names`.

    Each combination of recipes in a block is compiled anew, which takes seconds: what moves together makes few of them,
    and those of a whole block in the base are there since the run began.
    """
    blocks = {units[name].block for name in names} - {""}
    return [name for name in among if name not in names and units[name].block in blocks]


def to_compile(
    units: Mapping[str, AdaptiveUnit], recipes: Mapping[str, str], changed: Collection[str], base: str
) -> int:
    """How many blocks a change makes a compiler work on: those of the layers that changed, unless all is in the base.

    A layer in no block counts as one.

    Args:
        recipes: of all layers, after the change.
    """
    places = {name: units[name].block or name for name in units}
    return len({places[name] for name in changed} & {places[name] for name in units if recipes[name] != base})
