"""Where two runs part, as plain values: the content of `deepseek-mp report --diff`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.report.alarms import AlarmDifference, compare_alarms
from deepseek_mp.report.history import Step
from deepseek_mp.report.layers import Choice, LayerHistory
from deepseek_mp.report.load import open_run
from deepseek_mp.report.parting import Parting, part
from deepseek_mp.report.products import LayerDifference, compare_layers
from deepseek_mp.report.settings import differing, recipes_of
from deepseek_mp.report.statistics import StatisticDifference, compare_statistics, read_spreads
from deepseek_mp.report.storage import StorageDifference, compare_storage
from deepseek_mp.report.summary import RunReport, report_of

TOLERANCE = 0.05
"""Relative difference of two losses that is worth a look."""
SERIES = ("loss", "grad_norm", "scale")


@dataclass(frozen=True, kw_only=True)
class MovedDecision:
    """A decision that both runs have, at different steps."""

    choice: Choice
    step_b: int


@dataclass(frozen=True, kw_only=True)
class RunDifference:
    """Two runs, and everything in which they differ. Points hold the value of A and of B."""

    a: RunReport
    b: RunReport
    tolerance: float
    settings: tuple[tuple[str, Any, Any], ...]
    """(name, value in A, value in B)."""
    layers: tuple[LayerDifference, ...]
    decisions_a: tuple[Choice, ...]
    """Those that only A has: no choice of B is of this layer and role, with this recipe and reason."""
    decisions_b: tuple[Choice, ...]
    moved: tuple[MovedDecision, ...]
    storage: tuple[StorageDifference, ...]
    alarms: tuple[AlarmDifference, ...]
    statistics: tuple[StatisticDifference, ...]
    """Medians by layer, of all statistics that both runs have."""
    without_statistics: str
    """'A' or 'B', if only the other run has statistics by layer; else empty."""
    series: Mapping[str, Parting]
    """`SERIES` by step."""
    skipped_a: tuple[Step, ...]
    """Steps that A did not apply, and B did or does not have."""
    skipped_b: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, the numbers of each run beside each other."""
        return {
            "a": self.a.path,
            "b": self.b.path,
            "tolerance": self.tolerance,
            "settings": [{"name": name, "a": a, "b": b} for name, a, b in self.settings],
            "precision": [layer.to_json() for layer in self.layers],
            "decisions": {
                "only_a": [choice.to_json() for choice in self.decisions_a],
                "only_b": [choice.to_json() for choice in self.decisions_b],
                "other_step": [{**moved.choice.to_json(), "step_b": moved.step_b} for moved in self.moved],
            },
            "storage": [found.to_json() for found in self.storage],
            "alarms": [found.to_json() for found in self.alarms],
            "statistics": [found.to_json() for found in self.statistics],
            **{name: parting.to_json() for name, parting in self.series.items()},
            "skipped": {
                "only_a": [step.step for step in self.skipped_a],
                "only_b": [step.step for step in self.skipped_b],
            },
            "numbers": {name: {"a": a, "b": b} for name, a, b in numbers_of(self.a, self.b)},
            "notes": {"a": list(self.a.notes), "b": list(self.b.notes)},
        }


def compare_runs(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, tolerance: float = TOLERANCE
) -> RunDifference:
    """Read two run directories and compare them.

    Args:
        a: the run that the other is measured against.
        b: the other run.
        tolerance: relative difference from which two values of a step count as parted.

    Raises:
        ConfigError: a directory holds no run that this release reads, or the tolerance is no number from 0.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(explain(f"tolerance={tolerance!r}", "a finite number from 0", "Pass for example 0.05"))
    run_a, run_b = open_run(a), open_run(b)
    one, other = report_of(run_a), report_of(run_b)
    only_a, only_b, moved = compare_choices(one.layers, other.layers)
    in_a, in_b = read_spreads(run_a), read_spreads(run_b)
    skipped_a = {step.step: step for step in one.history.skipped}
    skipped_b = {step.step: step for step in other.history.skipped}
    return RunDifference(
        a=one,
        b=other,
        tolerance=tolerance,
        settings=tuple(differing(one.settings, other.settings)),
        layers=tuple(compare_layers(one.layers, other.layers, recipes_of(run_a), recipes_of(run_b))),
        decisions_a=only_a,
        decisions_b=only_b,
        moved=moved,
        storage=compare_storage(one.layers.storage, other.layers.storage),
        alarms=compare_alarms(one.alarms, other.alarms),
        statistics=compare_statistics(in_a, in_b, tolerance),
        without_statistics="" if bool(in_a) == bool(in_b) else "B" if in_a else "A",
        series={name: _part(one, other, name, tolerance) for name in SERIES},
        skipped_a=tuple(step for number, step in skipped_a.items() if number not in skipped_b),
        skipped_b=tuple(step for number, step in skipped_b.items() if number not in skipped_a),
    )


def compare_choices(
    a: LayerHistory, b: LayerHistory
) -> tuple[tuple[Choice, ...], tuple[Choice, ...], tuple[MovedDecision, ...]]:
    """The choices that only one run has, and those that both have at different steps."""
    here, there = _by_content(a), _by_content(b)
    only_a = tuple(choice for key, choice in here.items() if key not in there)
    only_b = tuple(choice for key, choice in there.items() if key not in here)
    moved = [
        MovedDecision(choice=choice, step_b=there[key].step)
        for key, choice in here.items()
        if key in there and there[key].step != choice.step
    ]
    return only_a, only_b, tuple(moved)


def numbers_of(a: RunReport, b: RunReport) -> list[tuple[str, float | None, float | None]]:
    """(name, in A, in B) of the numbers that describe a whole run."""

    def numbers(run: RunReport) -> dict[str, float | None]:
        return {
            "steps": len(run.steps),
            "steps_applied": run.applied,
            "steps_skipped": len(run.history.skipped),
            "last_loss": run.last_loss,
            "lowest_loss": None if run.lowest_loss is None else run.lowest_loss.loss,
            "last_scale": None if run.scale is None else run.scale.last,
            "scale_changes": None if run.scale is None else run.scale.changes,
            "seconds_per_step": None if run.seconds_per_step is None else run.seconds_per_step.median,
            "samples_per_second": None if run.samples_per_second is None else run.samples_per_second.median,
            "flop_utilisation": None if run.flop_utilisation is None else run.flop_utilisation.median,
            "peak_memory_bytes": run.peak_memory_bytes,
            "joules_per_step": run.joules_per_step,
            "alarms": sum(alarms.times for alarms in run.alarms),
            "budget_scale": run.layers.budget_scale,
            **run.history.validation,
        }

    in_a, in_b = numbers(a), numbers(b)
    return [(name, in_a.get(name), in_b.get(name)) for name in dict.fromkeys([*in_a, *in_b])]


def _by_content(layers: LayerHistory) -> dict[tuple[str, str | None, str, str], Choice]:
    """Each choice by what it says, where it was made first."""
    found: dict[tuple[str, str | None, str, str], Choice] = {}
    for choice in (*layers.in_force, *layers.changes, *layers.saturated, *layers.compared):
        key = (choice.layer, choice.role, choice.new, choice.reason)
        if key not in found or choice.step < found[key].step:
            found[key] = choice
    return found


def _part(a: RunReport, b: RunReport, name: str, tolerance: float) -> Parting:
    one, other = (run.history.series(lambda step: getattr(step, name)) for run in (a, b))
    return part(one, other, tolerance)
