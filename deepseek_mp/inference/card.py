"""What a served model is: its form, and its numbers beside those of every other form that was tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_mp.inference.choice import Trial
from deepseek_mp.inference.form import Form

_HEAD = ("form", "ms", "p95", "per second", "weights MiB", "peak MiB", "J", "error", "why")


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """The form that was chosen, and why each of the others was not."""

    form: Form
    budget: float
    metric: str
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        trials = [trial.to_json() for trial in self.trials]
        return {"form": self.form.to_json(), "budget": self.budget, "metric": self.metric, "trials": trials}


@dataclass(frozen=True, kw_only=True)
class Card:
    """The numbers of a model on a device: latency, throughput, memory, energy, and distance to FP32."""

    model: str
    device: str
    batch_size: int
    plan: ServingPlan

    @property
    def chosen(self) -> Trial:
        return next(trial for trial in self.plan.trials if trial.form == self.plan.form)

    def to_json(self) -> dict[str, Any]:
        about = {"model": self.model, "device": self.device, "batch_size": self.batch_size}
        return {**about, **self.plan.to_json()}

    def __str__(self) -> str:
        """A table: the chosen form first, the others as they were tried."""
        trials = [self.chosen, *(trial for trial in self.plan.trials if trial is not self.chosen)]
        rows = [_HEAD, *(self._row(trial) for trial in trials)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(_HEAD) - 1)]
        head = f"{self.model} on {self.device}, batches of {self.batch_size}; error by {self.plan.metric}"
        return "\n".join([head, *(_line(row, widths) for row in rows)])

    def _row(self, trial: Trial) -> tuple[str, ...]:
        latency = trial.latency
        ms = ("-", "-", "-")
        if latency is not None:
            rate = 1e3 * self.batch_size / latency.median_ms
            ms = (f"{latency.median_ms:.4g}", f"{latency.p95_ms:.4g}", f"{rate:.4g}")
        peak = "-" if trial.peak_bytes is None else f"{trial.peak_bytes / 2**20:.4g}"
        joules = "-" if trial.energy is None else f"{trial.energy.joules:.3g} ({trial.energy.above_idle_joules:.3g})"
        error = "-" if trial.error is None else f"{trial.error:.2g}"
        return (trial.form.name, *ms, f"{trial.weight_bytes / 2**20:.4g}", peak, joules, error, trial.why)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
