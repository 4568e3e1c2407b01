"""Which modules stay in FP32: those named, or those that a precision plan found sensitive."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from deepseek_mp.errors import ConfigError, explain, suggest
from deepseek_mp.precision import PrecisionPlan

WIDE = ("fp64", "fp32", "tf32", "hf32")
SHOWN = 8
"""Names in a message."""


def kept_names(model: nn.Module, keep: Collection[str] | PrecisionPlan | Path | None) -> list[str]:
    """Names of modules of the model that stay in FP32.

    Args:
        model: has them.
        keep: the names, None for no one; or a plan whose base is narrower than FP32, such as the profiler makes, or
            the path of its file: then the layers that it raises to FP32.

    Raises:
        ConfigError: no names of the model's modules, or a plan that runs all in FP32 and so found nothing out.
        PlanError: the file holds no plan, or a rule matches nothing.
    """
    if isinstance(keep, Path):
        keep = PrecisionPlan.load(keep)
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(keep, PrecisionPlan):
        return _raised(names, keep)
    if keep is None:
        return []
    allowed = "a list of names of the model's modules, a PrecisionPlan, or the Path of one"
    one_alone = isinstance(keep, str) or not isinstance(keep, Iterable)
    kept: list[Any] = [keep] if one_alone else list(keep)  # of an iterator, which gives its names once
    if one_alone or not all(name in names for name in kept):
        wrong = keep if one_alone else next(name for name in kept if name not in names)
        hint = suggest(wrong, names) if isinstance(wrong, str) else ""
        if isinstance(keep, str) and keep in names:
            hint = f" Pass [{keep!r}]."
        hint = hint or f" The model has {_first(names)}."
        raise ConfigError(explain(f"keep={keep!r}", allowed, f"Change {wrong!r}.{hint}"))
    return kept


def _first(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(map(repr, names[:SHOWN])) or "no modules in it") + more


def _raised(names: Collection[str], plan: PrecisionPlan) -> list[str]:
    if plan.base.region in WIDE:
        passed = f"keep as a plan of the base {plan.base.name}"
        change = "Profile with base='bf16', or name the layers"
        raise ConfigError(explain(passed, "a plan that raises layers above a narrower base", change))
    plan.check_names(names)
    return [name for name in names if plan.recipe_for(name).region in WIDE]
