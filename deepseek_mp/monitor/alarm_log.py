"""From copies of the store, one after each sampled step, to the alarms of a run."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from deepseek_mp.monitor.alarms import Alarm, Judge, Limits
from deepseek_mp.monitor.observed import Observed
from deepseek_mp.monitor.sides import sides_of
from deepseek_mp.monitor.store import TENSORS, Parts
from deepseek_mp.monitor.symptoms import symptoms

log = logging.getLogger("deepseek_mp.monitor")

KEPT = 256
"""Alarms that are remembered; older ones are forgotten, so that memory stays what it is."""
_MADE_IN = ("output", "grad_input")
"""Where a producer's first non-finite value is, by phase."""


@dataclass(frozen=True)
class Sampled:
    """What a copy of the store was made after."""

    step: int
    units: tuple[int, ...]
    whole: bool
    """Whether all modules were watched for non-finite values."""


class AlarmLog:
    """Judges each sampled step, once."""

    def __init__(self, limits: Limits) -> None:
        self.alarms: deque[Alarm] = deque(maxlen=KEPT)
        self.raised = 0
        """Alarms so far, those forgotten included."""
        self._limits, self._judge = limits, Judge(limits)
        self._counts: Tensor | None = None
        self._bad = 0.0
        self._said: set[tuple[str, str]] = set()

    def take_in(self, seen: Observed, sampled: Sampled) -> bool:
        """Judge the copy that has just arrived; whether its step met values that are not finite."""
        parts = seen.parts(seen.copies.latest)
        before = self._counts if self._counts is not None else parts.count.new_zeros(parts.count.shape)
        self._counts = parts.count.clone()
        for alarm in self._of_step(seen, sampled, parts, before):
            self.raised += 1
            self.alarms.append(alarm)
            if (alarm.layer, alarm.kind) not in self._said:
                self._said.add((alarm.layer, alarm.kind))
                log.warning("%s", alarm)
        was, self._bad = self._bad, float(parts.bad.sum())
        return self._bad > was

    def _of_step(self, seen: Observed, sampled: Sampled, parts: Parts, before: Tensor) -> Iterator[Alarm]:
        for unit in sampled.units:
            now = [name for t, name in enumerate(TENSORS) if parts.count[unit, t] != before[unit, t]]
            if not now:
                continue
            sides = sides_of(seen.recipes[unit]) if unit in seen.recipes else {}
            readings = symptoms(parts, unit, now, sides, self._limits)
            yield from self._judge.judge(sampled.step, seen.subjects[unit].name, readings)
        step, place, phase = (int(number) for number in parts.origin[1].tolist())
        if self._limits.non_finite and step == sampled.step:
            yield Alarm(
                step=step,
                layer=seen.modules[place],
                tensor=_MADE_IN[phase],
                kind="non_finite",
                value=float(parts.bad[place].sum()),
                limit=0.0,
            )
