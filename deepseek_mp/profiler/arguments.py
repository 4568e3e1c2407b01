"""What `PrecisionProfiler` was given, checked: the model, the batches, the counts, and which arguments go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.errors import BatchError, ConfigError, LoaderError, PlanError, explain
from deepseek_mp.ops.storage_marks import storage_of
from deepseek_mp.precision import Recipe, find_recipe

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def check_model(model: Any) -> None:
    """`ConfigError` for what is no model."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigError(explain(f"{what} as model", "a torch.nn.Module", "Pass the model itself"))


def check_masters(model: nn.Module) -> None:
    """`PlanError` for trained parameters in 16 bits, but for those that an optimizer looks after."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in _SIXTEEN_BITS and storage_of(parameter) is None:
            passed = f"{name!r}, which is trained and stored in {parameter.dtype}"
            allowed = "trained parameters in fp32, which a plan takes as master weights"
            raise PlanError(explain(passed, allowed, "Call model.float() first"))


def check_batches(batches: Any) -> None:
    """`LoaderError` for what cannot be iterated, `BatchError` for one batch in place of several."""
    if _is_one_batch(batches):
        passed = f"batches that are one batch, a {type(batches).__name__}"
        raise BatchError(explain(passed, "an iterable of batches", "Pass [batch]"))
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise LoaderError(explain(f"batches {batches!r}", "an iterable of batches", "Pass a DataLoader, or a list"))


def _is_one_batch(batches: Any) -> bool:
    """A tensor, a mapping, or a pair of tensors; a list of two that are alike may be two batches."""
    if isinstance(batches, Tensor | Mapping):
        return True
    if not (isinstance(batches, tuple | list) and len(batches) == 2 and all(isinstance(b, Tensor) for b in batches)):
        return False
    first, second = batches
    return isinstance(batches, tuple) or (first.dtype, first.shape[1:]) != (second.dtype, second.shape[1:])


def check_count(name: str, value: Any, least: int) -> None:
    """`ConfigError` for what is no whole number, or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(explain(f"{name}={value!r}", f"a whole number from {least} on", "Pass for example 8"))


def check_unused(given: Mapping[str, bool], where: str) -> None:
    """`ConfigError` naming the arguments that were given and would be ignored."""
    unused = ", ".join(name for name, is_given in given.items() if is_given)
    if unused:
        allowed = (
            "batches, max_batches, verify, time_layers and resume for a loss; tolerance, formats and parts for a metric"
        )
        raise ConfigError(explain(f"{unused} {where}", allowed, "Leave it out, or ask the other question"))


def ordered_recipes(formats: Sequence[str]) -> dict[str, Recipe]:
    """The recipes of a metric by name; `ConfigError` unless each is as wide as the next or wider."""
    found = [find_recipe(format) for format in formats]
    widths = [recipe.fprop.left.format.storage_bits for recipe in found]
    if widths != sorted(widths, reverse=True):
        allowed = "recipes from the highest to the lowest"
        raise ConfigError(explain(f"formats {list(formats)}", allowed, "Name them in the other order"))
    return {recipe.name: recipe for recipe in found}
