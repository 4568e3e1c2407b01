"""Which of a trainer's callbacks is its live precision, and that it is that trainer's alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deepseek_mp.controller import AdaptiveSettings
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.trainer.adaptive import AdaptivePrecision
from deepseek_mp.trainer.callbacks import Callback
from deepseek_mp.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer


def adaptive_of(callbacks: Sequence[Callback]) -> AdaptivePrecision | None:
    """The live precision among the callbacks."""
    return next((callback for callback in callbacks if isinstance(callback, AdaptivePrecision)), None)


def with_adaptive(callbacks: tuple[Callback, ...], config: TrainerConfig) -> tuple[Callback, ...]:
    """The callbacks, and live precision after them where the settings of a run ask for it and none is among them.

    Raises:
        ConfigError: two of them, one although `adapt` says something else, or one that has steered another trainer.
    """
    given, adapt = [callback for callback in callbacks if isinstance(callback, AdaptivePrecision)], config.adapt
    if len(given) > 1 or (given and adapt is not None and adapt is not True):
        passed = f"adapt={adapt!r} and {len(given)} AdaptivePrecision among the callbacks"
        raise ConfigError(explain(passed, "one of them that says what is wanted", "Leave one out"))
    if given and given[0].controller is not None:
        passed = "an AdaptivePrecision that has steered another trainer, whose layers it knows"
        raise ConfigError(explain(passed, "one for each trainer", "Make a new one with the same settings"))
    if given or adapt is False or config.precision_mode != "auto":
        return callbacks
    return (*callbacks, AdaptivePrecision(adapt if isinstance(adapt, AdaptiveSettings) else None))


@contextmanager
def looks_ended(trainer: MixedPrecisionTrainer) -> Iterator[None]:
    """However training ends inside, live precision leaves nothing on the model and the optimizer."""
    try:
        yield
    finally:
        if trainer.adaptive is not None:
            trainer.adaptive.stop_watching(trainer)
