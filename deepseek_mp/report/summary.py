"""What one run was and did, as plain values: the content of `deepseek-mp report`."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.records import Attempt, Run
from deepseek_mp.report.alarms import Alarms, read_alarms
from deepseek_mp.report.amounts import counted
from deepseek_mp.report.history import Fallbacks, History, Step, read_history
from deepseek_mp.report.layers import LayerHistory, read_layers
from deepseek_mp.report.load import open_run
from deepseek_mp.report.settings import differing, read_plan, settings_of
from deepseek_mp.report.spread import Spread, spread

LAST = 10
"""Steps averaged into the last loss, which for a single batch is noisy."""


@dataclass(frozen=True, kw_only=True)
class ScaleSummary:
    """What the loss scale did."""

    first: float
    last: float
    low: float
    high: float
    changes: int


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run in numbers; None where the record does not say. Seconds, bytes, joules; losses as recorded."""

    path: str
    settings: Mapping[str, Any]
    plan: PrecisionPlan | None
    attempts: tuple[Attempt, ...]
    attempt_steps: Mapping[int, int]
    """Attempt -> steps in force that it made."""
    attempt_changes: Mapping[int, list[tuple[str, Any, Any]]]
    """Attempt -> settings that differ from the attempt before: name, value before, value now."""
    history: History
    layers: LayerHistory
    alarms: tuple[Alarms, ...]
    scale: ScaleSummary | None
    seconds_per_step: Spread | None
    """Without the first step of each attempt, in which code is compiled and `auto` measures."""
    samples_per_second: Spread | None
    flop_utilisation: Spread | None
    peak_memory_bytes: float | None
    joules: float | None
    """Over the `joules_steps` steps between the first and the last reading of each attempt."""
    joules_steps: int
    notes: tuple[str, ...]
    """What is missing or damaged, and what that does to the numbers."""

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.history.steps

    @property
    def applied(self) -> int:
        """Steps that changed the weights."""
        return len(self.steps) - len(self.history.skipped)

    @property
    def first_loss(self) -> float | None:
        return next((step.loss for step in self.steps if step.loss is not None), None)

    @property
    def last_loss(self) -> float | None:
        """Mean of the last `LAST` applied steps; NaN if one of them is."""
        losses = [step.loss for step in self.steps if step.loss is not None and step.status == "applied"][-LAST:]
        return sum(losses) / len(losses) if losses else None

    @property
    def lowest_loss(self) -> Step | None:
        """The step with the lowest loss."""
        finite = [step for step in self.steps if step.loss is not None and math.isfinite(step.loss)]
        return min(finite, key=lambda step: step.loss or 0.0, default=None)

    @property
    def joules_per_step(self) -> float | None:
        return self.joules / self.joules_steps if self.joules is not None and self.joules_steps else None

    @property
    def fallbacks(self) -> Fallbacks:
        return self.history.fallbacks

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite as they are, since a record writes them in words."""
        return {
            "path": self.path,
            "settings": dict(self.settings),
            "plan": None if self.plan is None else self.plan.to_json(),
            "attempts": [
                {**vars(attempt), "steps": self.attempt_steps.get(attempt.attempt, 0)} for attempt in self.attempts
            ],
            "steps": len(self.steps),
            "applied": self.applied,
            "epochs": list(self.history.epochs),
            "loss": {
                "first": self.first_loss,
                "last": self.last_loss,
                "lowest": None if self.lowest_loss is None else self.lowest_loss.loss,
                "lowest_step": None if self.lowest_loss is None else self.lowest_loss.step,
                "curve": [[step.step, step.loss] for step in self.steps if step.loss is not None],
            },
            "scale": None if self.scale is None else vars(self.scale),
            "skipped": [
                {"step": s.step, "status": s.status, "reason": s.reason, "first_bad_module": s.first_bad_module}
                for s in self.history.skipped
            ],
            **{name: _json(getattr(self, name)) for name in SPREADS},
            "peak_memory_bytes": self.peak_memory_bytes,
            "joules": self.joules,
            "joules_per_step": self.joules_per_step,
            "decisions": [choice.to_json() for choice in self.layers.in_force],
            "changes": [choice.to_json() for choice in self.layers.changes],
            "adapt_off": list(self.layers.adapt_off),
            "compared": [choice.to_json() for choice in self.layers.compared],
            "storage": [choice.to_json() for choice in self.layers.storage],
            "alarms": [alarms.to_json() for alarms in self.alarms],
            "saturated": [choice.to_json() for choice in self.layers.saturated],
            "fallbacks": [
                {"op": op, "format": format, "reason": reason, "count": count}
                for (op, format, reason), count in self.fallbacks.items()
            ],
            "notes": list(self.notes),
        }


SPREADS = ("seconds_per_step", "samples_per_second", "flop_utilisation")


def report_run(path: str | os.PathLike[str]) -> RunReport:
    """Read a run directory and sum it up; `ConfigError` if it is not one that this release reads."""
    return report_of(open_run(path))


def report_of(run: Run) -> RunReport:
    """Sum up a run that was read."""
    history, layers = read_history(run), read_layers(run)
    plan = read_plan(run.plan)
    joules, joules_steps = _energy(history.steps)
    steady = _steady(history.steps)
    return RunReport(
        path=str(run.path),
        settings=settings_of(run),
        plan=plan if isinstance(plan, PrecisionPlan) else None,
        attempts=run.attempts,
        attempt_steps=Counter(step.attempt for step in history.steps),
        attempt_changes=_changed_settings(run),
        history=history,
        layers=layers,
        alarms=read_alarms(run),
        scale=_scale(history.steps),
        seconds_per_step=spread(step.seconds for step in steady),
        samples_per_second=spread(step.samples_per_second for step in steady),
        flop_utilisation=spread(step.flop_utilisation for step in steady),
        peak_memory_bytes=max((m for s in history.steps if (m := s.peak_memory_bytes) is not None), default=None),
        joules=joules,
        joules_steps=joules_steps,
        notes=tuple(_notes(run, history, layers, plan)),
    )


def _json(found: Spread | None) -> dict[str, float] | None:
    return None if found is None else found.to_json()


def _steady(steps: Sequence[Step]) -> list[Step]:
    """Steps but the first of each attempt, which has its start in it; all, if there are no others."""
    first = {step.attempt: step.step for step in reversed(steps)}
    return [step for step in steps if step.step != first[step.attempt]] or list(steps)


def _scale(steps: Sequence[Step]) -> ScaleSummary | None:
    scales = [step.scale for step in steps if step.scale is not None]
    if not scales:
        return None
    changes = sum(a != b for a, b in pairwise(scales))
    return ScaleSummary(first=scales[0], last=scales[-1], low=min(scales), high=max(scales), changes=changes)


def _energy(steps: Sequence[Step]) -> tuple[float | None, int]:
    """Joules of all readings, and how many steps they cover; a reading counts from the one before it."""
    total, covered = 0.0, 0
    before: dict[int, int] = {}
    for step in steps:
        if step.joules is not None and step.attempt in before:
            total += step.joules
            covered += step.step - before[step.attempt]
        if step.joules is not None or step.peak_memory_bytes is not None:
            before[step.attempt] = step.step
    return (total, covered) if covered else (None, 0)


def _changed_settings(run: Run) -> dict[int, list[tuple[str, Any, Any]]]:
    pairs = pairwise(run.attempts)
    found = {b.attempt: differing(settings_of(run, a.info), settings_of(run, b.info)) for a, b in pairs}
    return {attempt: changed for attempt, changed in found.items() if changed}


def _notes(run: Run, history: History, layers: LayerHistory, plan: PrecisionPlan | str | None) -> list[str]:
    """What a reader should know about the record itself."""
    notes = []
    if run.torn_lines:
        notes.append(f"{counted(run.torn_lines, 'line')} cut short, by a kill or a full disk: left out")
    if not history.steps:
        notes.append("no step is recorded")
    if run.superseded_metrics:
        again = counted(len(run.superseded_metrics), "line")
        notes.append(f"{again} of steps that a later attempt made again: left out")
    bad = sum(step.loss is not None and not math.isfinite(step.loss) for step in history.steps)
    if bad:
        notes.append(f"the loss is not finite in {counted(bad, 'step')}")
    if isinstance(plan, str):
        notes.append(f"the plan cannot be read: {plan}")
    if plan is None:
        notes.append("no plan is recorded")
    if not layers.in_force:
        notes.append("no decision is recorded")
    if run.attempts[-1].outcome is None:
        notes.append("the last attempt did not end: it is still running, or was killed")
    return notes
