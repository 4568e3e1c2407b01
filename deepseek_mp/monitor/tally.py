"""The counters of the monitor: numbers by key, never a tensor, so memory does not grow with steps."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from deepseek_mp.monitor.counts import Count, Fallback, OpCount, Phase
from deepseek_mp.monitor.usage import Usage
from deepseek_mp.precision import Reason


@dataclass(slots=True)
class Steps:
    """Calls of the model, and how many of them were counted."""

    seen: int = 0
    sampled: int = 0


@dataclass
class Tally:
    """Everything counted since the last report.

    Autograd runs the nodes of each device on a thread of its own, so several threads may count at
    once; one lock guards the counters.
    """

    train: Steps = field(default_factory=Steps)
    evaluation: Steps = field(default_factory=Steps)
    compiled_counted_eagerly: bool = False
    notes: dict[str, None] = field(default_factory=dict)
    _ops: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    _fallbacks: dict[tuple[str, str, Phase, str, Reason], int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, layer: str, op: str, format: str, phase: Phase, reason: Reason | None = None) -> None:
        """One operation ran; `reason` if it fell back to a wide format."""
        with self._lock:
            cell = self._ops.setdefault((layer, op, format), [0, 0])
            cell[phase == "backward"] += 1
            if reason is not None:
                key = (layer, op, phase, format, reason)
                self._fallbacks[key] = self._fallbacks.get(key, 0) + 1

    def note(self, text: str) -> None:
        """Say something in the next report, once."""
        self.notes[text] = None

    def steps(self, *, train: bool) -> Steps:
        return self.train if train else self.evaluation

    def usage(self) -> Usage:
        """The counters as a report."""
        with self._lock:
            counts = tuple(
                OpCount(layer=layer, op=op, format=format, count=Count(*cell))
                for (layer, op, format), cell in self._ops.items()
            )
            fallbacks = tuple(
                Fallback(layer=layer, op=op, phase=phase, format=format, reason=reason, count=count)
                for (layer, op, phase, format, reason), count in self._fallbacks.items()
            )
        return Usage(
            steps=self.train.seen,
            sampled_steps=self.train.sampled,
            eval_steps=self.evaluation.seen,
            sampled_eval_steps=self.evaluation.sampled,
            compiled_counted_eagerly=self.compiled_counted_eagerly,
            counts=counts,
            fallbacks=fallbacks,
            notes=tuple(self.notes),
        )
