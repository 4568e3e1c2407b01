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
from deepseek_mp.monitor.store import PHASES, TENSORS, Parts
from deepseek_mp.monitor.symptoms import symptoms
from deepseek_mp.ops.storage_marks import storage_of

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
        self._bad: Tensor | None = None
        self._backward_in_a_row = 0
        """Sampled steps in a row in which a gradient went bad."""
        self._last_step = 0
        self._said: set[tuple[str, str]] = set()

    def since(self, raised: int) -> tuple[Alarm, ...]:
        """The alarms after the first `raised` ones, as far as they are remembered."""
        new = self.raised - raised
        return tuple(self.alarms)[-new:] if new > 0 else ()

    def take_in(self, seen: Observed, sampled: Sampled) -> bool:
        """Judge the copy that has just arrived; whether its step met values that are not finite."""
        parts = seen.parts(seen.copies.latest)
        counts = parts.count.clone() if self._counts is None else parts.count - self._counts
        bad = parts.bad.clone() if self._bad is None else parts.bad - self._bad
        self._counts, self._bad = parts.count.clone(), parts.bad.clone()
        for alarm in (*self._of_layers(seen, sampled, parts, counts), *self._of_numbers(seen, sampled, parts, bad)):
            self.raised += 1
            self.alarms.append(alarm)
            if (alarm.layer, alarm.kind) not in self._said:
                self._said.add((alarm.layer, alarm.kind))
                log.warning("%s", alarm)
        return any(bad.flatten().tolist())

    def _of_layers(self, seen: Observed, sampled: Sampled, parts: Parts, counts: Tensor) -> Iterator[Alarm]:
        for unit in sampled.units:
            now = [name for name, count in zip(TENSORS, counts[unit].tolist(), strict=True) if count]
            if now:
                sides = sides_of(seen.recipes[unit]) if unit in seen.recipes else {}
                subject = seen.subjects[unit]
                is_kept = storage_of(subject.weight) is not None
                readings = symptoms(parts, unit, now, sides, self._limits, step=sampled.step, is_kept=is_kept)
                yield from self._judge.judge(sampled.step, subject.name, readings)

    def _of_numbers(self, seen: Observed, sampled: Sampled, parts: Parts, bad: Tensor) -> Iterator[Alarm]:
        """The producer of non-finite values in this step, if there was one and it is not to be waited for others.

        Asked once about a step, though there are two copies of one whose update comes late.
        """
        again, self._last_step = sampled.step == self._last_step, sampled.step
        if again:
            return
        step, place, phase = (int(number) for number in parts.origin[1].tolist())
        found = step == sampled.step
        in_backward = found and PHASES[phase] == "backward"
        self._backward_in_a_row = self._backward_in_a_row + 1 if in_backward else 0
        waits = in_backward and self._backward_in_a_row != self._limits.in_a_row
        if self._limits.non_finite and found and not waits:
            yield Alarm(
                step=step,
                layer=seen.modules[place],
                tensor=_MADE_IN[phase],
                kind="non_finite",
                value=sum(bad[place].tolist()),
                limit=0.0,
            )
