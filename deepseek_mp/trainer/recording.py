"""What a run writes down while it trains, and the running numbers that others read."""

from __future__ import annotations

import math
import platform
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from deepseek_mp import backends
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.records import RunWriter
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.trainer.window import Window
from deepseek_mp.version import __version__

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

COUNTERS_EVERY = 16
"""Steps between two readings of memory and energy: reading them costs more than a record does."""


class Recorder:
    """Writes metrics, decisions and the plan to the run directory; with None it only keeps sums."""

    def __init__(self, run_dir: str | Path | None, trainer: MixedPrecisionTrainer) -> None:
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.running_loss = math.nan
        self._trainer = trainer
        self._writer: RunWriter | None = None
        self._last = time.monotonic()
        self._joules: float | None = None
        self._sums = {"loss": 0.0, "applied": 0.0, "skipped": 0.0, "samples": 0.0}

    def __enter__(self) -> Recorder:
        self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def _out(self) -> RunWriter | None:
        if self._writer is None and self.run_dir is not None:
            self._writer = RunWriter(self.run_dir, info=describe(self._trainer))
        return self._writer

    def plan(self, plan: PrecisionPlan) -> None:
        """A plan came into force."""
        out = self._out
        if out is None:
            return
        out.plan(plan.to_json())
        for decision in plan.decisions:
            out.decision({"step": self._trainer.steps_attempted, **decision.to_json()})

    def step(self, facts: StepFacts, window: Window) -> None:
        """A window is settled."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        applied = facts.status == "applied"
        if applied:
            self.running_loss = facts.loss
            self._sums["loss"] += facts.loss
        self._sums["applied"] += applied
        self._sums["skipped"] += facts.status == "skipped"
        self._sums["samples"] += window.samples
        out = self._out
        if out is None:
            return
        out.metrics(
            step=self._trainer.steps_attempted,
            applied=self._trainer.steps_applied,
            epoch=self._trainer.position.epoch,
            status=facts.status,
            loss=facts.loss,
            scale=facts.scale,
            grad_norm=facts.grad_norm,
            lr=float(self._trainer.optimizer.param_groups[0]["lr"]),
            seconds=seconds,
            samples_per_second=window.samples / seconds if seconds else None,
            flop_utilisation=self._utilisation(window, seconds),
            **({"reason": facts.reason, "first_bad_module": facts.first_bad_module} if not applied else {}),
            **self._counters(),
        )

    def _utilisation(self, window: Window, seconds: float) -> float | None:
        """Model FLOPs over what the device could do in the plan's format; None where its peak is unknown."""
        peak = self._trainer.capabilities.peak_tflops.get(self._trainer.plan.base.name)
        flops = self._trainer.stepper.flops
        if peak is None or flops is None or not seconds:
            return None
        return flops * window.micro_batches / (seconds * peak * 1e12)

    def _counters(self) -> dict[str, float | None]:
        if self._trainer.steps_attempted % COUNTERS_EVERY != 1:
            return {}
        device = self._trainer.device
        joules = backends.energy_joules(device)
        spent = None if joules is None or self._joules is None else joules - self._joules
        self._joules = joules
        return {"peak_memory_bytes": backends.peak_memory_bytes(device), "joules": spent}

    def start_epoch(self) -> None:
        """Sums begin again, and time spent between epochs belongs to no step."""
        self._sums = dict.fromkeys(self._sums, 0.0)
        self._last = time.monotonic()

    def epoch_summary(self, seconds: float) -> dict[str, Any]:
        """The epoch's mean loss over applied steps, its skipped steps, and its speed."""
        applied = self._sums["applied"]
        return {
            "loss": self._sums["loss"] / applied if applied else math.nan,
            "skipped": int(self._sums["skipped"]),
            "seconds": seconds,
            "samples_per_second": self._sums["samples"] / seconds if seconds else None,
        }

    def epoch(self, entry: dict[str, Any]) -> None:
        """An epoch and its validation are done."""
        out = self._out
        if out is not None:
            out.metrics(step=self._trainer.steps_attempted, status="epoch", **entry)


def describe(trainer: MixedPrecisionTrainer) -> dict[str, Any]:
    """Versions, device and configuration, as JSON values."""
    config = {
        name: value.to_json() if isinstance(value, PrecisionPlan) else value
        for name, value in vars(trainer.config).items()
    }
    config["pin"] = {name: str(recipe) for name, recipe in (trainer.config.pin or {}).items()}
    return {
        "versions": {"deepseek_mp": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": {"torch": str(trainer.device), **trainer.capabilities.to_json()},
        "config": config,
        "optimizer": type(trainer.optimizer).__name__,
        "model": type(trainer.model).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
