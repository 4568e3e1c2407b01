"""The options of `deepseek-mp train` that need reading: how far, in which precision, with which pins, and where."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.config import MemoryOption

RUNS = Path("runs")
"""Where a run directory is made if none is named."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How far a whole run goes."""

    epochs: int
    steps: int | None

    @classmethod
    def of(cls, epochs: int | None, steps: int | None) -> Extent:
        """One epoch unless something is asked for; `ConfigError` for both."""
        if epochs is not None and steps is not None:
            raise ConfigError(explain("--epochs and --steps", "one of them", "Leave one out"))
        return cls(epochs=(1 if steps is None else sys.maxsize) if epochs is None else epochs, steps=steps)


def read_precision(text: str) -> str | PrecisionPlan:
    """A name, or the plan in a file."""
    if not text.endswith(".json"):
        return text
    try:
        return PrecisionPlan.load(text)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            explain(f"--precision {text}: {reason}", "a plan that profile --plan wrote", "Correct the path")
        ) from error


def read_memory(text: str | None) -> MemoryOption:
    """'auto', or a number of GiB."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        change = "Write for example --memory auto, or --memory 20"
        raise ConfigError(explain(f"--memory {text}", "auto, or a number of GiB", change)) from error


def read_pins(given: Sequence[str]) -> dict[str, str]:
    """Pattern -> recipe."""
    pins = {}
    for text in given:
        pattern, equals, recipe = text.rpartition("=")
        if not (equals and pattern and recipe):
            allowed = "PATTERN=RECIPE, as in --pin 'head=fp32'"
            raise ConfigError(explain(f"--pin {text!r}", allowed, "Write the pattern, = and the recipe"))
        pins[pattern] = recipe
    return pins


def unused(target: str) -> Path:
    """A directory in `RUNS` that is not there yet, named after the function."""
    name = target.rpartition(":")[2]
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(RUNS / one for one in names if not (RUNS / one).exists())
