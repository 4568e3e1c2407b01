"""Every error this package raises on purpose, and the one form their messages take.

A message says what was passed, what is allowed, and what to change. Mistakes of the caller are
`ValueError`s; failures of the run (non-finite numbers, a corrupt checkpoint) have a type of their
own, so that a program can tell them apart without reading text.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from typing import Any


class MixedPrecisionError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(MixedPrecisionError, ValueError):
    """An argument has a value that is not allowed, alone or beside another one."""


class FormatError(ConfigError):
    """A number format is unknown, or this device does not have it."""


class ShapeError(ConfigError):
    """A tensor's sizes do not fit a granularity or a kernel."""


class PlanError(ConfigError):
    """A precision plan does not fit the model, or cannot be read."""


class BatchError(ConfigError):
    """A batch, its output or its loss does not have a form that can be trained on."""


class LoaderError(ConfigError):
    """A data loader gave nothing to train on."""


class LossScaleError(ConfigError):
    """A loss scale, its policy or its saved state is not valid."""


class CheckpointError(MixedPrecisionError, ValueError):
    """A checkpoint is incomplete, corrupt, of another model, or could not be written."""


class NonFiniteError(MixedPrecisionError, ArithmeticError):
    """Too many steps in a row were skipped because of non-finite numbers.

    `first_bad_module` names the first module that produced a non-finite value (None if the values
    were finite when the step was replayed); `skipped` is the number of steps skipped in a row.
    """

    def __init__(self, message: str, *, first_bad_module: str | None, skipped: int) -> None:
        super().__init__(message)
        self.first_bad_module = first_bad_module
        self.skipped = skipped

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the keyword arguments, which an exception's own way of pickling leaves out."""
        build = partial(type(self), first_bad_module=self.first_bad_module, skipped=self.skipped)
        return build, self.args


def explain(passed: str, allowed: str, change: str) -> str:
    """One message of three sentences; a part may bring its own full stop or question mark."""
    return " ".join(_sentence(part) for part in (passed, f"Allowed: {allowed}", change))


def suggest(word: str, known: Iterable[str]) -> str:
    """A ` Did you mean 'x'?` clause for a mistyped name, empty when nothing known is near."""
    by_lower_case = {name.lower(): name for name in known}
    wanted = word.lower()
    near = [wanted] if wanted in by_lower_case else get_close_matches(wanted, by_lower_case, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(by_lower_case[name]) for name in near)}?" if near else ""


def _sentence(part: str) -> str:
    """The part with exactly one mark at its end; a list cut short by `...` says so in words."""
    if part.endswith("..."):
        part = part.rstrip(" ,.") + " and more"
    part = part.rstrip(". \n")
    return part if part.endswith(("?", "!")) else f"{part}."


def first_line(error: BaseException) -> str:
    """The type of an error of other code and the first line of what it says, to name it in one of ours."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
