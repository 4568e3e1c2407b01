"""Hooks into a fit: override what you need, every method does nothing by default.

A callback may also define `state_dict()` (JSON values) and `load_state_dict(state)`; they are then
part of the checkpoint. What `recorded_settings()` gives is part of the record of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.trainer.result import FitResult, StepFacts

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer


class Callback:
    """Base of callbacks."""

    def recorded_settings(self) -> Mapping[str, Any]:
        """What the callback was told to do, by name, for `run.json`: values that JSON has, or mappings of such.

        `deepseek-mp report --diff` lists those that two runs do not share. Asked once an attempt, before its first
        line is written. A callback that gives none is not in the record.
        """
        return {}

    def on_fit_start(self, trainer: MixedPrecisionTrainer) -> None:
        """Before the first batch, after a resume."""

    def on_step_start(self, trainer: MixedPrecisionTrainer, batch: Any) -> None:
        """Before the first micro-batch of a step, given as loaded; with 'auto', not before the plan is known."""

    def on_gradients(self, trainer: MixedPrecisionTrainer) -> None:
        """The gradients of a full window are ready: unscaled, not yet checked, clipped or applied.

        Overriding this costs one more pass over the gradients. Those of an offloaded optimizer are at its masters,
        `trainer.optimizer.master(parameter).grad`.
        """

    def on_step(self, trainer: MixedPrecisionTrainer, facts: StepFacts) -> None:
        """A window's outcome is known; on an accelerator that is during the next window."""

    def on_skip(self, trainer: MixedPrecisionTrainer, facts: StepFacts, batches: list[tuple[int, Any]]) -> None:
        """A step was skipped; `batches` are its (index within the epoch, batch) pairs, as loaded."""

    def on_epoch_end(self, trainer: MixedPrecisionTrainer, epoch: int, metrics: dict[str, Any]) -> None:
        """An epoch and its validation are done; `metrics` is its entry of the history."""

    def on_fit_end(self, trainer: MixedPrecisionTrainer, result: FitResult) -> None:
        """After the last step, also of a resumed run that had nothing left to do."""


def overrides(callback: Callback, method: str) -> bool:
    """Whether the callback's class defines `method` itself."""
    return getattr(type(callback), method) is not getattr(Callback, method)


def settings_of(callbacks: Iterable[Callback]) -> dict[str, dict[str, Any]]:
    """Name of a callback's class -> its settings, of those that give any; a second one of a class is 'Name 2'.

    `ConfigError` if one gives something else than a mapping.
    """
    found: dict[str, dict[str, Any]] = {}
    of_class: Counter[str] = Counter()
    for callback in callbacks:
        name = type(callback).__name__
        of_class[name] += 1
        given = callback.recorded_settings()
        if not isinstance(given, Mapping):
            allowed, change = "a mapping of names to values that JSON has", "Return {} if there is nothing to record"
            raise ConfigError(explain(f"recorded_settings() of {name} gave {given!r}", allowed, change))
        if given:
            found[name if of_class[name] == 1 else f"{name} {of_class[name]}"] = dict(given)
    return found


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks as a tuple; `ConfigError` if something else is among them."""
    given = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    if not isinstance(callbacks, Iterable) or not all(isinstance(callback, Callback) for callback in given):
        wrong = [callback for callback in given if not isinstance(callback, Callback)]
        passed = f"callbacks with {wrong[0]!r}" if wrong else f"callbacks={callbacks!r}"
        raise ConfigError(
            explain(passed, "a list of objects of deepseek_mp.Callback", "Subclass Callback, and pass a list")
        )
    return given
