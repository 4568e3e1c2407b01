"""What a run writes down while it trains, and the running numbers that others read."""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from deepseek_mp import backends
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.monitor.layer_statistics import SAMPLED
from deepseek_mp.nn import Saturated
from deepseek_mp.nn.delayed import HISTORY
from deepseek_mp.precision import OPERANDS, Decision, PrecisionPlan, Reason
from deepseek_mp.precision.storage import STORAGE_KIND, StorageDecision
from deepseek_mp.records import RunWriter
from deepseek_mp.records.runfile import CHECKPOINTS, RUN_FILE, load_attempts
from deepseek_mp.trainer.callbacks import settings_of
from deepseek_mp.trainer.offloaded import described
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.trainer.window import Window
from deepseek_mp.version import __version__

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

log = logging.getLogger("deepseek_mp")
decided = logging.getLogger("deepseek_mp.decisions")
"""Has a line for each decision that is taken while a model trains."""

COUNTERS_EVERY = 16
"""Steps between two readings of memory and energy: reading them costs more than a record does."""


SUMS = ("loss", "applied", "skipped", "samples", "seconds")


class Recorder:
    """Writes metrics, decisions and the plan to the run directory; with None it only keeps sums.

    The directory is made, and an attempt begun, with the first record: a run that is refused before
    its first step leaves nothing behind, and a resumed one knows by then from which step it goes on.
    """

    def __init__(self, run_dir: str | os.PathLike[str] | None, trainer: MixedPrecisionTrainer) -> None:
        self.run_dir = None if run_dir is None else _usable(run_dir)
        self.running_loss = math.nan
        self._trainer = trainer
        self._writer: RunWriter | None = None
        self._plan: PrecisionPlan | None = None
        """A plan in force that is not written down yet."""
        self._decided: list[dict[str, Any]] = []
        """Decisions taken before there was anything to write them to."""
        self._said: dict[tuple[str, str | None, str | None], dict[str, tuple[Any, ...]]] = {}
        """By layer, role and kind, what was written last: the choice, and that it is emulated."""
        self._last = time.monotonic()
        self._joules: float | None = None
        self._alarms = 0
        """Alarms of the monitor that are written down."""
        self.sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        """Totals of the epoch so far; part of a checkpoint, since its summary must not depend on a resume."""

    def __enter__(self) -> Recorder:
        self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = "stopped" if self._trainer.stopping else "completed"
        self.close(done if kind is None else f"failed: {kind.__name__}")

    def close(self, outcome: str = "completed") -> None:
        """End the attempt; a later record begins another."""
        if self._writer is not None:
            self._writer.close(outcome)
            self._writer = None

    def check_unused(self) -> None:
        """`ConfigError` if this run would begin anew among the checkpoints of an earlier one, and replace them."""
        kept = self._checkpoints()
        if kept and not self._trainer.steps_attempted:
            change = f"Pass resume={str(self.run_dir)!r} to continue it, or choose another run_dir"
            passed = f"run_dir {str(self.run_dir)!r} with {len(kept)} checkpoints, the last {kept[-1].name}"
            raise ConfigError(explain(passed, "an unused run_dir, or resume", change))

    def _checkpoints(self) -> list[Path]:
        """The folders of checkpoints in the run directory, by name."""
        return [] if self.run_dir is None else sorted((self.run_dir / CHECKPOINTS).glob("step-*"))

    def ended_early(self, error: BaseException) -> None:
        """Say how far the run came, and how to go on, if there is something to go on from."""
        how = f"; continue from its last checkpoint with resume={str(self.run_dir)!r}" if self._checkpoints() else ""
        log.warning("fit ended by %s after %d steps%s", type(error).__name__, self._trainer.steps_attempted, how)

    def _out(self, *, done: int) -> RunWriter | None:
        """The writer, opened if need be by a run that has `done` steps behind it."""
        if self._writer is None and self.run_dir is not None:
            self._writer = RunWriter(self.run_dir, info=describe(self._trainer), resume_step=done)
            self._said.clear()  # of an earlier attempt, of which a reader may leave out what comes after the resume
            if self._plan is None and self._trainer.has_stepper:
                self._plan = self._trainer.plan
        if self._writer is not None and self._plan is not None:
            self._writer.plan(self._plan.to_json())
            self._decided[:0] = [{"step": done, **decision.to_json()} for decision in self._plan.decisions]
            self._plan = None
        if self._writer is not None:
            for line in filter(self._is_new, self._decided):
                self._writer.decision(line)
            self._decided.clear()
        return self._writer

    def _is_new(self, line: Mapping[str, Any]) -> bool:
        """Whether the line was not written yet: a plan brings the decisions on all layers, of which few are new."""
        said = self._said.setdefault((line["layer"], line["role"], line.get("kind")), {})
        if any(new != line["new"] for _, new, *_ in said.values()):
            said.clear()
        # That a recipe is emulated is said beside the choice; of choices only the last one holds.
        kind = Reason.EMULATED if line["reason"] == Reason.EMULATED else ""
        what = line["reason"], line["new"], line["detail"], line["evidence"]
        is_new = said.get(kind) != what
        said[kind] = what
        return is_new

    def plan(self, plan: PrecisionPlan) -> None:
        """A plan came into force; it is written down with the next record."""
        log.info("%s", plan)
        self._plan = plan

    def step(self, facts: StepFacts, window: Window) -> None:
        """A window is settled."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        applied = facts.status == "applied"
        if applied:
            self.running_loss = facts.loss
            self.sums["loss"] += facts.loss
        self.sums["applied"] += applied
        self.sums["skipped"] += facts.status == "skipped"
        self.sums["samples"] += window.samples
        self.sums["seconds"] += seconds
        out = self._out(done=self._trainer.steps_attempted - 1)
        for decision in map(self._saturated, facts.saturated):
            if out is not None:
                out.decision({"step": self._trainer.steps_attempted, **decision.to_json()})
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
            **self._alarmed(),
            **(self._statistics() if not self._trainer.steps_attempted % self._trainer.config.monitor_every else {}),
        )

    def decided(self, decisions: Sequence[Decision | StorageDecision]) -> None:
        """Decisions taken between two steps; those that change no plan are said here only."""
        step = self._trainer.steps_attempted
        for decision in decisions:
            decided.info("step %d: %s", step, decision)
        if self.run_dir is not None:
            self._decided += [{"step": step, **_line(decision)} for decision in decisions]
        if self._writer is not None:
            self._out(done=step)

    def _alarmed(self) -> dict[str, Any]:
        """The alarms that are new, if there are any."""
        monitor, written = self._trainer.monitor, self._alarms
        self._alarms = monitor.alarms_raised
        new = monitor.alarms_since(written)
        return {"alarms": [alarm.to_json() for alarm in new]} if new else {}

    def _statistics(self) -> dict[str, Any]:
        """What the monitor knows of layers, as far as it has arrived on the host."""
        layers = self._trainer.monitor.statistics(wait=False).items()
        known = {name: layer.to_json() for name, layer in layers if layer.status == SAMPLED}
        return {"statistics": known} if known else {}

    def _saturated(self, found: Saturated) -> Decision:
        """What became of a tensor that outgrew its scale; it is said once aloud."""
        recipe = self._trainer.plan.recipe_for(found.layer).name
        detail = f"its {found.operand} outgrew its past; scaled by its own maximum for {HISTORY} steps"
        if found.steps == 1:
            log.warning("%s: %s", found.layer, detail)
        return Decision(
            layer=found.layer,
            role=next(role for role, operands in OPERANDS.items() if found.operand in operands),
            old=recipe,
            new=recipe,
            reason=Reason.SATURATED,
            detail=detail,
            evidence={"operand": found.operand.value, "steps_saturated": found.steps},
        )

    def _utilisation(self, window: Window, seconds: float) -> float | None:
        """Model FLOPs over what the device could do in the base's forward format; None where its peak is unknown."""
        peak = self._trainer.capabilities.peak_tflops.get(self._trainer.plan.base.fprop.left.format.name)
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

    def start_epoch(self, *, continued: bool) -> None:
        """Sums begin again unless this is the rest of an epoch; time spent between epochs belongs to no step."""
        if not continued:
            self.sums = dict.fromkeys(SUMS, 0.0)
        self._last = time.monotonic()

    def epoch_summary(self) -> dict[str, Any]:
        """The epoch's mean loss over applied steps, its skipped steps, and its speed."""
        applied, seconds = self.sums["applied"], self.sums["seconds"]
        return {
            "loss": self.sums["loss"] / applied if applied else math.nan,
            "skipped": int(self.sums["skipped"]),
            "seconds": seconds,
            "samples_per_second": self.sums["samples"] / seconds if seconds else None,
        }

    def epoch(self, entry: dict[str, Any], *, last: bool) -> None:
        """An epoch and its validation are done; `last`: it ends the fit."""
        log.info("epoch %s", {key: round(v, 6) if isinstance(v, float) else v for key, v in entry.items()})
        out = self._out(done=self._trainer.steps_attempted)
        if out is not None:
            more = {**self._alarmed(), **self._statistics()} if last else {}
            out.metrics(step=self._trainer.steps_attempted, status="epoch", **entry, **more)


def _line(decision: Decision | StorageDecision) -> dict[str, Any]:
    """A decision as its line in the records; that about a storage is marked, since it is none about a recipe."""
    line = decision.to_json()
    if isinstance(decision, StorageDecision):
        del line["state"]
        line |= {"role": None, "kind": STORAGE_KIND}
    return line


def _usable(run_dir: str | os.PathLike[str]) -> Path:
    """The run directory as a path; `ConfigError` if it cannot be one. Nothing is made."""
    if not isinstance(run_dir, str | os.PathLike):
        raise ConfigError(explain(f"run_dir={run_dir!r}", "None or the path of a directory", "Pass a path"))
    path = Path(run_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(explain(f"run_dir {path} is a file", "a run directory or a new path", "Choose another"))
    place = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        passed = f"run_dir {path}, where {place} {'cannot be written to' if place.is_dir() else 'is a file'}"
        raise ConfigError(explain(passed, "a place that this process may write to", "Choose another"))
    if (path / RUN_FILE).exists():
        load_attempts(path)  # of a record version that this release can add to
    return path


def describe(trainer: MixedPrecisionTrainer) -> dict[str, Any]:
    """Versions, device and configuration, as JSON values."""
    config = {
        name: value.to_json() if isinstance(value, PrecisionPlan) else value
        for name, value in vars(trainer.config).items()
    }
    if isinstance(trainer.config.adapt, AdaptiveSettings):
        config["adapt"] = True  # they are among those of the callback
    config["pin"] = {name: str(recipe) for name, recipe in (trainer.config.pin or {}).items()}
    return {
        "versions": {"deepseek_mp": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": {"torch": str(trainer.device), **trainer.capabilities.to_json()},
        "config": config,
        **({"callbacks": settings} if (settings := settings_of(trainer.callbacks)) else {}),
        "optimizer": type(trainer.optimizer).__name__,
        **described(trainer.optimizer),
        "model": type(trainer.model).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
