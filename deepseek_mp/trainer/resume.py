"""Everything a bit-identical continuation needs, written to a checkpoint and read back.

Reading checks everything against the run at hand before it changes anything: a checkpoint of
another model, optimizer or policy leaves the run as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deepseek_mp.errors import CheckpointError, explain
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer import state
from deepseek_mp.trainer.checkpoint import Snapshot, newest_checkpoint, read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

STATE_VERSION = 1


def checkpoint_root(path: Path) -> Path:
    """The folder of checkpoints of a run directory."""
    return path if path.name == "checkpoints" else path / "checkpoints"


def save(trainer: MixedPrecisionTrainer, path: Path) -> Path:
    """Write a checkpoint of the settled trainer under `path`."""
    optimizer_tensors, optimizer_values = state.optimizer_state(trainer.model, trainer.optimizer)
    random_tensors, position = trainer.position.save(trainer.loader)
    window_tensors, window_values = trainer.stepper.save_window()
    snapshot = Snapshot(
        step=trainer.steps_attempted,
        tensors={
            "model": state.model_tensors(trainer.model),
            "buffers": state.transient_buffers(trainer.model),
            "optimizer": optimizer_tensors,
            "ema": trainer.ema.values if trainer.ema is not None else {},
            "window": window_tensors,
            "rng": random_tensors,
        },
        state={
            "version": STATE_VERSION,
            "plan": trainer.plan.to_json(),
            "counters": {
                "attempted": trainer.steps_attempted,
                "applied": trainer.steps_applied,
                "skipped_in_row": trainer.stepper.skipped_in_row,
            },
            "optimizer": optimizer_values,
            "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "position": position,
            "window": window_values,
            "history": trainer.history,
            "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in trainer.callbacks],
        },
    )
    return write_checkpoint(checkpoint_root(path), snapshot)


def restore(trainer: MixedPrecisionTrainer, path: Path) -> None:
    """Continue from the newest checkpoint under `path` that verifies.

    Raises:
        CheckpointError: there is none, or it does not belong to this run; nothing has changed then.
    """
    newest = newest_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            explain(
                f"no complete checkpoint under {path}",
                "a run directory, a folder of checkpoints, or one checkpoint",
                "Check the path, or start without resume",
            )
        )
    snapshot = read_checkpoint(newest)
    tensors, saved = snapshot.tensors, snapshot.state
    _check(trainer, snapshot, newest)
    stepper = trainer.adopt_plan(PrecisionPlan.from_json(saved["plan"]), saved["scaler"])
    state.load_model(trainer.model, tensors["model"], tensors["buffers"])
    state.load_optimizer(trainer.model, trainer.optimizer, tensors["optimizer"], saved["optimizer"])
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(saved["scheduler"])
    if trainer.ema is not None:
        trainer.ema.load(tensors["ema"])
    trainer.steps_attempted = saved["counters"]["attempted"]
    trainer.steps_applied = saved["counters"]["applied"]
    stepper.skipped_in_row = saved["counters"]["skipped_in_row"]
    trainer.history[:] = saved["history"]
    trainer.position.load(tensors["rng"], saved["position"])
    stepper.load_window(tensors["window"], saved["window"])
    for callback, kept in zip(trainer.callbacks, saved["callbacks"], strict=True):
        if kept is not None:
            cast(Any, callback).load_state_dict(kept)


def _refuse(path: Path, what: str, change: str) -> CheckpointError:
    return CheckpointError(explain(f"checkpoint {path} {what}", "a checkpoint of this very run", change))


def _check(trainer: MixedPrecisionTrainer, snapshot: Snapshot, path: Path) -> None:
    """Everything about the checkpoint fits the trainer, or an error before anything has changed."""
    saved: Mapping[str, Any] = snapshot.state
    if saved.get("version") != STATE_VERSION:
        raise _refuse(
            path, f"has state version {saved.get('version')!r}, not {STATE_VERSION}", "Use a matching release"
        )
    state.check_model(trainer.model, snapshot.tensors["model"])
    state.check_optimizer(trainer.model, trainer.optimizer, snapshot.tensors["optimizer"], saved["optimizer"])
    if (trainer.scheduler is None) != (saved["scheduler"] is None):
        had = "a" if saved["scheduler"] is not None else "no"
        raise _refuse(path, f"was written with {had} scheduler", f"Resume with {had} scheduler")
    averages = snapshot.tensors.get("ema", {})
    here = {} if trainer.ema is None else trainer.ema.values
    if averages.keys() != here.keys():
        raise _refuse(path, f"averages {len(averages)} weights, not {len(here)}", "Pass the ema_decay it had")
    if len(saved["callbacks"]) != len(trainer.callbacks):
        raise _refuse(path, f"was written with {len(saved['callbacks'])} callbacks", "Pass the same callbacks")
    trainer.check_scaler(PrecisionPlan.from_json(saved["plan"]), saved["scaler"])
