"""Which form is taken, from what was measured of each: pure values in, a choice and its reasons out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepseek_mp.inference.form import Form
from deepseek_mp.inference.measure import Energy, Latency

SAME = 0.03
"""Forms within this of the fastest are as fast: the first one tried is taken."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was found out about a form."""

    form: Form
    latency: Latency | None = None
    error: float | None = None
    """The metric's distance to the FP32 reference."""
    weight_bytes: int = 0
    peak_bytes: int | None = None
    """In tensors while it runs, weights included; None where the device does not count."""
    energy: Energy | None = None
    problem: str = ""
    """Why it cannot be used, if it cannot."""
    why: str = ""
    """Why it was taken or not."""

    @property
    def is_usable(self) -> bool:
        return not self.problem and self.latency is not None

    def to_json(self) -> dict[str, Any]:
        parts = {"latency": self.latency, "energy": self.energy}
        return {
            "form": self.form.to_json(),
            "name": self.form.name,
            "error": self.error,
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.peak_bytes,
            "problem": self.problem,
            "why": self.why,
            **{key: None if part is None else part.to_json() for key, part in parts.items()},
        }


def choose(trials: Sequence[Trial], budget: float) -> tuple[Form, list[Trial]]:
    """The fastest form whose error is within the budget, and the trials with the reason of each.

    Of forms within `SAME` of the fastest the first is taken. The FP32 reference, which is first, is always within.
    """
    allowed = [trial for trial in trials if trial.is_usable and _within(trial, budget)]
    fastest = min(_ms(trial) for trial in allowed)
    taken = next(trial for trial in allowed if _ms(trial) <= (1 + SAME) * fastest)
    return taken.form, list(_explained(trials, taken, budget))


def _within(trial: Trial, budget: float) -> bool:
    return trial.error is not None and math.isfinite(trial.error) and trial.error <= budget


def _ms(trial: Trial) -> float:
    assert trial.latency is not None, "asked only of what was timed"
    return trial.latency.median_ms


def _explained(trials: Sequence[Trial], taken: Trial, budget: float) -> Iterator[Trial]:
    first = _ms(trials[0])
    for trial in trials:
        if trial.problem:
            yield replace(trial, why=trial.problem)
        elif not trial.is_usable:
            yield replace(trial, why="not timed")
        elif not _within(trial, budget):
            yield replace(trial, why=f"error {trial.error:.3g} is beyond the budget of {budget:g}")
        elif trial is taken and taken is trials[0]:
            yield replace(trial, why=f"taken: no other form within {budget:g} is more than {SAME:.0%} faster")
        elif trial is taken:
            gain = f"{first / _ms(trial):.3g} times as fast as {trials[0].form.name}"
            yield replace(trial, why=f"taken: {gain}, error {trial.error:.3g} within {budget:g}")
        else:
            equal = ", which counts as equal and was tried before" if _ms(trial) < _ms(taken) else ""
            yield replace(trial, why=f"{_ms(trial) / _ms(taken):.3g} times the time of {taken.form.name}{equal}")
