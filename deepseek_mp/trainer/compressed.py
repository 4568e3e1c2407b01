"""What a step keeps for its backward, compressed (`activations`), where the trainer is to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deepseek_mp.activations import Account, ActivationRecord, ActivationSettings, compressed_activations
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.trainer.budget import Budgeted
from deepseek_mp.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

Run = Callable[[calls.Call], calls.Result]
_MICRO_BATCHES = 1 << 20
"""More than a window has, so that no two forwards of a run have one number."""


def check_activations(config: TrainerConfig) -> None:
    """`ConfigError` for compressed activations of compiled code."""
    if config.activations is not False and config.compile:
        passed = f"activations={config.activations!r} with compile={config.compile!r}"
        allowed = "one of the two: compiled code decides itself what it keeps, and its saved tensors meet no hook"
        raise ConfigError(explain(passed, allowed, "Leave out compile, or activations"))


def activations_of(trainer: MixedPrecisionTrainer) -> ActivationRecord | None:
    """The record of the last forward; None before the first and where nothing is compressed."""
    compute = trainer.stepper.compute if trainer.has_stepper else None
    run = compute.run if isinstance(compute, Budgeted) else compute
    return run.record if isinstance(run, Compressed) else None


def with_activations(run: Run, trainer: MixedPrecisionTrainer) -> Run:
    """`run`, which keeps less for its backward if the trainer is set so."""
    option = trainer.config.activations
    if option is False:
        return run
    return Compressed(run, trainer, ActivationSettings() if option is True else option)


class Compressed:
    """From a call to its loss, as `run`, whose saved tensors are compressed."""

    def __init__(self, run: Run, trainer: MixedPrecisionTrainer, settings: ActivationSettings) -> None:
        self.run, self._trainer, self._settings = run, trainer, settings
        self._account: Account | None = None

    def __call__(self, call: calls.Call) -> calls.Result:
        trainer = self._trainer
        # Its place in the run: a step that is tried again, and a run that is resumed, round as before.
        number = trainer.steps_attempted * _MICRO_BATCHES
        if trainer.has_stepper:
            number += trainer.stepper.window.micro_batches
        with compressed_activations(trainer.model, self._settings, number=number) as account:
            found = self.run(call)
        self._account = account
        return found

    @property
    def record(self) -> ActivationRecord | None:
        """Of the last forward: what was saved in which form. Made when it is asked for, not in every step."""
        return None if self._account is None else self._account.record()
