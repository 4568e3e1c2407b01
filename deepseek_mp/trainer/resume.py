"""Everything a bit-identical continuation needs, written to a checkpoint and read back.

Reading checks everything against the run at hand before it changes anything: a checkpoint of
another model, optimizer or policy leaves the run as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deepseek_mp.errors import CheckpointError, explain
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.precision import Decision, PrecisionPlan, Reason, Recipe
from deepseek_mp.trainer import saved_memory, saved_storage, state
from deepseek_mp.trainer.callbacks import Callback
from deepseek_mp.trainer.checkpoint import Snapshot, newest_checkpoint, read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

log = logging.getLogger("deepseek_mp")

STATE_VERSION = 1
STATE_KEYS = {
    "plan", "counters", "optimizer", "scheduler", "scaler", "position", "window", "epoch", "history", "callbacks",
}  # fmt: skip
TENSOR_KEYS = {"model", "buffers", "optimizer", "outside", "ema", "window", "rng", "state"}
SHOWN = 4
"""Differences of two plans that one line of the log has."""
CHANGE_LOADER = "Pass the loader that the run was saved with"


def checkpoint_root(path: Path) -> Path:
    """The folder of checkpoints of a run directory."""
    return path if path.name == "checkpoints" else path / "checkpoints"


def save(trainer: MixedPrecisionTrainer, path: Path) -> Path:
    """Write a checkpoint of the settled trainer under `path`."""
    optimizer_tensors, optimizer_values = state.optimizer_state(trainer.model, trainer.optimizer)
    random_tensors, position = trainer.position.save(trainer.loader)
    window_tensors, window_values = trainer.stepper.save_window()
    values = {
        "version": STATE_VERSION,
        "plan": trainer.plan.to_json(),
        "counters": {
            "attempted": trainer.steps_attempted,
            "applied": trainer.steps_applied,
            "skipped_in_row": trainer.stepper.skipped_in_row,
        },
        "optimizer": optimizer_values,
        "scheduler": _scheduler_state(trainer.scheduler),
        "scaler": trainer.scaler.state_dict(),
        "position": position,
        "window": window_values,
        "epoch": trainer.recorder.sums,
        "history": trainer.history,
        "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in _others(trainer)],
        "memory": saved_memory.saved_memory(trainer),
        "adaptive": None if trainer.adaptive is None else trainer.adaptive.state_dict(),
    }
    inside: state.Tensors = {}
    values = state.split_tensors(values, inside)
    tensors = {
        "model": state.model_tensors(trainer.model),
        "buffers": state.transient_buffers(trainer.model),
        "optimizer": optimizer_tensors,
        "outside": state.outside_parameters(trainer.model, trainer.optimizer),
        "ema": trainer.ema.values if trainer.ema is not None else {},
        "window": window_tensors,
        "rng": random_tensors,
        "state": inside,
    }
    scales = {name: tensor for one in scales_of(trainer.model) for name, tensor in one.tensors().items()}
    if scales:
        tensors["scales"] = scales
    if of_loss := state.loss_buffers(trainer.loss_fn):
        tensors["loss"] = of_loss
    return write_checkpoint(
        checkpoint_root(path), Snapshot(step=trainer.steps_attempted, tensors=tensors, state=values)
    )


def _scheduler_state(scheduler: Any) -> dict[str, Any] | None:
    return None if scheduler is None else {"type": type(scheduler).__name__, "state": scheduler.state_dict()}


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
    undo = saved_memory.adopt(trainer, snapshot.state)  # before it is checked: the optimizer's kind is looked at there
    try:
        _check(trainer, snapshot, newest)
    except BaseException:
        undo()
        raise
    tensors = snapshot.tensors
    saved = state.join_tensors(dict(snapshot.state), tensors["state"])
    _say_what_changes(trainer, saved["optimizer"])
    saved_storage.adopt(trainer.optimizer, _formats(trainer, snapshot))
    plan, live = PrecisionPlan.from_json(saved["plan"]), saved.get("adaptive")
    is_named = trainer.has_stepper
    if is_named:
        _say_how_plans_differ(trainer.plan, plan, _live_layers(live))
        plan = trainer.plan
    _say_what_becomes_of_live(trainer, live, is_named=is_named)
    stepper = trainer.adopt_plan(plan, saved["scaler"])
    saved_memory.compute_anew(trainer)
    state.load_model(trainer.model, tensors["model"], tensors["buffers"])
    state.load_buffers(state.loss_buffers(trainer.loss_fn), tensors.get("loss", {}))
    # Before the state: an offloaded optimizer takes over there what weights it finds.
    state.load_tensors(state.outside_parameters(trainer.model, trainer.optimizer), tensors["outside"])
    state.load_optimizer(trainer.model, trainer.optimizer, tensors["optimizer"], saved["optimizer"])
    for scales in scales_of(trainer.model):
        scales.load(tensors.get("scales", {}))
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(saved["scheduler"]["state"])
    if trainer.ema is not None:
        trainer.ema.load(tensors["ema"])
    trainer.steps_attempted = saved["counters"]["attempted"]
    trainer.steps_applied = saved["counters"]["applied"]
    stepper.skipped_in_row = saved["counters"]["skipped_in_row"]
    trainer.history[:] = saved["history"]
    trainer.recorder.sums |= saved["epoch"]
    saved_storage.widen(trainer.model, trainer.optimizer, trainer.plan)
    stepper.load_window(tensors["window"], saved["window"])
    trainer.position.load(tensors["rng"], saved["position"], open_batches=stepper.window.micro_batches)
    for callback, kept in zip(_others(trainer), saved["callbacks"], strict=True):
        if kept is not None:
            cast(Any, callback).load_state_dict(kept)
    if trainer.adaptive is not None and live is not None:
        trainer.adaptive.load_state_dict(live)
    elif trainer.adaptive is not None:
        trainer.adaptive.reset()


def _others(trainer: MixedPrecisionTrainer) -> list[Callback]:
    """The callbacks but for live precision, which a resumed run may have or not."""
    return [callback for callback in trainer.callbacks if callback is not trainer.adaptive]


def _formats(trainer: MixedPrecisionTrainer, snapshot: Snapshot) -> saved_storage.Formats:
    """How the checkpoint's parameters are stored."""
    names = state.parameter_names(trainer.model, trainer.optimizer)
    saved: Mapping[str, Any] = snapshot.state["optimizer"]
    return saved_storage.saved_formats(names, trainer.optimizer, snapshot.tensors["optimizer"], saved)


def _say_what_changes(trainer: MixedPrecisionTrainer, saved: Mapping[str, Any]) -> None:
    """Log the optimizer's options that the checkpoint overrides: whoever passed them would expect them."""
    for i, (group, stored) in enumerate(zip(trainer.optimizer.param_groups, saved["groups"], strict=True)):
        for key, value in stored["options"].items():
            now = group.get(key)
            if isinstance(now, int | float | bool) and now != value and trainer.scheduler is None:
                log.warning("resumed with %s=%s from the checkpoint; group %d had %s", key, value, i, now)


def _live_layers(live: Mapping[str, Any] | None) -> frozenset[str]:
    """The layers that live precision decided on in the run of a checkpoint."""
    controller = None if live is None else live["controller"]
    return frozenset() if controller is None else frozenset(controller["states"])


def _say_how_plans_differ(plan: PrecisionPlan, saved: PrecisionPlan, live: frozenset[str]) -> None:
    """Log where the plan that this run names is not the checkpoint's, but for what live precision made of it."""
    if plan.digest == saved.digest:
        return
    pairs = [("the region", plan.base.region, saved.base.region)]
    pairs.append(("the memory format", plan.memory_format, saved.memory_format))
    recipes, before = ({d.layer: d.new for d in one.decisions if d.layer} for one in (plan, saved))
    pairs += [(name, recipes[name], before[name]) for name in recipes if name in before and name not in live]
    found = [f"{what} is {now}, was {then}" for what, now, then in pairs if now != then]
    if not found:
        return
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    same = plan.base.name == saved.base.name
    said = f"a changed plan {plan.base}" if same else f"plan {plan.base}; the checkpoint had {saved.base}"
    log.warning("resumed with %s: %s%s", said, "; ".join(found[:SHOWN]), more)


def _say_what_becomes_of_live(
    trainer: MixedPrecisionTrainer, live: Mapping[str, Any] | None, *, is_named: bool
) -> None:
    """Log that the checkpoint's run had live precision and this one has not, or the other way round."""
    if (trainer.adaptive is None) == (live is None):
        return
    if live is None:
        whose = "this run has" if is_named else "the checkpoint has"
        log.warning("resumed with live precision a run that was without; it goes on from the plan that %s", whose)
        return
    becomes = "layers go back to the plan that this run has" if is_named else "it keeps the checkpoint's plan"
    log.warning("resumed without live precision a run that was with; %s", becomes)


def resumed_plan(saved: PrecisionPlan, pin: Mapping[str, str | Recipe]) -> PrecisionPlan:
    """A checkpoint's measured plan for the run that continues it; its decisions say that they were resumed.

    Pins that the checkpoint did not have are put before its rules, and what was measured without them
    is no reason any more.
    """
    pins = PrecisionPlan.of("fp32", pin).rules
    if saved.rules[: len(pins)] != pins:
        log.warning("resumed with the pins %s, which the checkpoint's plan did not have", dict(pin))
        return saved.with_pins(pin)
    return replace(saved, decisions=tuple(map(_resumed, saved.decisions)))


def _resumed(decision: Decision) -> Decision:
    evidence = {"first_reason": decision.reason.value, **decision.evidence}
    return replace(decision, reason=Reason.RESUMED, evidence=evidence)


def _refuse(path: Path, what: str, change: str) -> CheckpointError:
    return CheckpointError(explain(f"checkpoint {path} {what}", "a checkpoint of this very run", change))


def _check(trainer: MixedPrecisionTrainer, snapshot: Snapshot, path: Path) -> None:
    """Everything about the checkpoint fits the trainer, or an error before anything has changed."""
    saved: Mapping[str, Any] = snapshot.state
    if saved.get("version") != STATE_VERSION:
        raise _refuse(
            path, f"has state version {saved.get('version')!r}, not {STATE_VERSION}", "Use a matching release"
        )
    for part, keys, needed in (("state", saved, STATE_KEYS), ("tensors", snapshot.tensors, TENSOR_KEYS)):
        if missing := sorted(needed - keys.keys()):
            raise _refuse(path, f"has no {part} {missing}", "Use another checkpoint")
    saved_memory.check_optimizer(trainer, saved)
    formats = _formats(trainer, snapshot)
    inside = dict(trainer.model.named_parameters(remove_duplicate=False))
    model_tensors = saved_storage.as_saved(state.model_tensors(trainer.model), inside, formats)
    state.check_tensors(model_tensors, snapshot.tensors["model"])
    state.check_optimizer(trainer.model, trainer.optimizer, saved["optimizer"])
    outside = state.outside_parameters(trainer.model, trainer.optimizer)
    state.check_tensors(saved_storage.as_saved(outside, outside, formats), snapshot.tensors["outside"])
    here, there = type(trainer.scheduler).__name__, (saved["scheduler"] or {"type": "NoneType"})["type"]
    if here != there:
        had = "no scheduler" if there == "NoneType" else f"a {there} as its scheduler"
        raise _refuse(path, f"was written with {had}", f"Resume with {had}")
    if saved["position"]["loader"] is not None and not hasattr(trainer.loader, "load_state_dict"):
        raise _refuse(path, "was written with a loader that keeps its own position", CHANGE_LOADER)
    averages, ours = snapshot.tensors["ema"], {} if trainer.ema is None else trainer.ema.values
    names = dict(trainer.model.named_parameters()).keys()  # any of these may have been unfrozen by then
    if bool(averages) != bool(ours) or not averages.keys() <= names:
        raise _refuse(path, f"averages {len(averages)} weights, not {len(ours)}", "Pass the ema_decay it had")
    if len(saved["callbacks"]) != len(_others(trainer)):
        raise _refuse(path, f"was written with {len(saved['callbacks'])} callbacks", "Pass the same callbacks")
    trainer.check_scaler(PrecisionPlan.from_json(saved["plan"]), saved["scaler"])
