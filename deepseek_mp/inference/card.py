"""What a served model is: its form, and its numbers beside those of every other form that was tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_mp.inference.choice import Trial
from deepseek_mp.inference.form import Form
from deepseek_mp.inference.layer_plan import LayerPlan
from deepseek_mp.report.table import listing, paragraph, tables

WIDTH = 120
"""Characters a line, where nobody says how many there are."""
_HEAD = ("form", "ms", "p95 ms", "per second", "weights MiB", "peak MiB", "J", "J above idle", "error")


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """The form that was chosen, and why each of the others was not."""

    form: Form
    budget: float
    metric: str
    trials: tuple[Trial, ...]
    layers: LayerPlan | None = None
    """What was found out about kinds by layer."""

    def to_json(self) -> dict[str, Any]:
        trials = [trial.to_json() for trial in self.trials]
        layers = None if self.layers is None else self.layers.to_json()
        about = {"form": self.form.to_json(), "budget": self.budget, "metric": self.metric}
        return {**about, "trials": trials, "layers": layers}

    def __str__(self) -> str:
        return "\n".join(self.lines(WIDTH))

    def lines(self, width: int) -> list[str]:
        """The reason of each form, the chosen one first, and kinds by layer."""
        layers = [] if self.layers is None else ["", *self.layers.lines(width)]
        return [*listing(((trial.form.name, trial.why) for trial in self.ordered()), width), *layers]

    def ordered(self) -> list[Trial]:
        """The chosen form's trial, then the others."""
        return sorted(self.trials, key=lambda trial: trial.form != self.form)


@dataclass(frozen=True, kw_only=True)
class Card:
    """The numbers of a model on a device: latency, throughput, memory, energy, and distance to FP32."""

    model: str
    device: str
    batch_size: int
    plan: ServingPlan

    @property
    def chosen(self) -> Trial:
        return self.plan.ordered()[0]

    def to_json(self) -> dict[str, Any]:
        about = {"model": self.model, "device": self.device, "batch_size": self.batch_size}
        return {**about, **self.plan.to_json()}

    def __str__(self) -> str:
        return self.text(WIDTH)

    def text(self, width: int) -> str:
        """Numbers in a table of that many characters or less, below it the reason of each form, and kinds by layer.

        The chosen form is first, the others follow as they were tried.
        """
        about = f"{self.model} on {self.device}, batches of {self.batch_size}; error by {self.plan.metric}"
        numbers = tables(_HEAD, map(self._row, self.plan.ordered()), width, repeated=1)
        return "\n".join([*paragraph(about, width), *numbers, "", *self.plan.lines(width)])

    def _row(self, trial: Trial) -> tuple[str, ...]:
        ms = ("", "", "")
        if trial.latency is not None:
            rate = 1e3 * self.batch_size / trial.latency.median_ms
            ms = (f"{trial.latency.median_ms:.4g}", f"{trial.latency.p95_ms:.4g}", f"{rate:.4g}")
        joules = ("", "")
        if trial.energy is not None:
            joules = (f"{trial.energy.joules:.3g}", f"{trial.energy.above_idle_joules:.3g}")
        weights, peak = (f"{count / 2**20:.4g}" if count else "" for count in (trial.weight_bytes, trial.peak_bytes))
        return (trial.form.name, *ms, weights, peak, *joules, "" if trial.error is None else f"{trial.error:.2g}")
