"""TARGET: the user's own function that returns what to profile or to train, found, called and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from deepseek_mp.cli.user_errors import explained
from deepseek_mp.cli.user_module import FORM, find_function, find_module
from deepseek_mp.errors import ConfigError, explain, suggest

RETURNS = "a mapping with the keys model, loader, loss_fn and further ones, or a tuple (model, loader, loss_fn)"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the function returned; parts are as for `MixedPrecisionTrainer`, and the keys of a mapping."""

    model: nn.Module
    loader: Any = None
    loss_fn: Any = None
    optimizer: Any = None
    val_loader: Any = None
    metric: Any = None
    """model -> number, the same every time: what `profile` may hold instead of a loss over batches."""
    tolerance: float | None = None
    """Largest relative error of the metric."""

    @property
    def by_metric(self) -> bool:
        """Whether there is nothing but a metric to profile the model by."""
        return self.metric is not None and self.loader is None

    def needed(self, name: str, what_for: str) -> Any:
        """A part that is not None; `ConfigError` that says what needs it."""
        if getattr(self, name) is None:
            passed = f"a target without {name}, which {what_for} needs"
            raise ConfigError(explain(passed, RETURNS, f"Let the function return {name} too"))
        return getattr(self, name)


def load_target(text: str) -> Target:
    """Import the file or module, call the function and check what it returns.

    Nothing else is executed. `ConfigError` if there is no such function, or it raised or returned something else.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(explain(f"target {text!r}", FORM, "Name the function, as in train.py:setup"))
    module = find_module(place)
    function = find_function(module, name, place)
    with explained(f"{text} raised", getattr(module, "__file__", None)):
        made = function()
    return _checked(made, text)


def _checked(made: Any, text: str) -> Target:
    names = [field.name for field in fields(Target)]
    if isinstance(made, Mapping):
        unknown = [key for key in made if key not in names]
        if unknown:
            hint = suggest(str(unknown[0]), names)
            raise ConfigError(explain(f"{text} returned the key {unknown[0]!r}", ", ".join(names), f"Rename it.{hint}"))
        parts = dict(made)
    elif isinstance(made, tuple) and len(made) == 3:
        parts = dict(zip(names[:3], made, strict=True))
    else:
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a value of type {type(made).__name__}"
        raise ConfigError(explain(f"{text} returned {what}", RETURNS, "Return one of these"))
    model = parts.get("model")
    if not isinstance(model, nn.Module):
        what = "no model" if model is None else f"a value of type {type(model).__name__} as model"
        raise ConfigError(explain(f"{text} returned {what}", "a torch.nn.Module", "Return the model itself"))
    if parts.get("metric") is not None and not callable(parts["metric"]):
        passed = f"{text} returned metric={parts['metric']!r}"
        raise ConfigError(explain(passed, "a function from the model to a number", "Return the function itself"))
    return Target(**parts)
