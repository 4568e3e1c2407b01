"""Compile a model whole, or its repeated blocks once each kind.

A deep model is mostly one block repeated. Compiling the block costs a fraction of compiling the model,
and the compiled code is shared by all its copies, since their parameters are inputs to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # so that its settings can be read before anything was compiled
from torch import nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.trainer.config import Compile

LISTS = (nn.ModuleList, nn.Sequential)
PLANS = 64
"""Combinations of recipes that a compiled block may run in before it is left to eager code."""


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that stand two or more times, alike, in one list of the model (or that it is).

    A list is a ModuleList or a Sequential; a block is a child of one that has children of its own.
    Blocks are alike if they have one class; lists as blocks, if they hold the same modules.
    """
    kinds: dict[Any, list[nn.Module]] = defaultdict(list)
    if isinstance(model, LISTS):
        for block in model:
            if next(block.children(), None) is not None:
                kinds[repr(block) if isinstance(block, LISTS) else type(block)].append(block)
    found: list[nn.Module] = []
    for child in model.children():
        alike = next((blocks for blocks in kinds.values() if any(child is block for block in blocks)), [])
        found += [child] if len(alike) > 1 else repeated_blocks(child)
    return list(dict.fromkeys(found))


def check_compile(model: nn.Module, how: Compile) -> None:
    """`ConfigError` for 'regional' on a model without repeated blocks."""
    if how == "regional" and not repeated_blocks(model):
        raise ConfigError(
            explain(
                "compile='regional' on a model without repeated blocks",
                "two or more modules of one class in a ModuleList or Sequential",
                "Use compile=True",
            )
        )


def compiled_forward(model: nn.Module, how: Compile) -> Callable[..., Any]:
    """What to call instead of the model. 'regional' compiles the blocks in place."""
    if how is True:
        return _with_many_plans(torch.compile(model))
    if how == "regional":
        for block in repeated_blocks(model):
            block.compile()
        return _with_many_plans(model)
    return model


def _with_many_plans(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward with room for compiled code of many plans.

    A block gets compiled code for every combination of its layers' recipes that it has run in. Beyond
    its limit of 8, dynamo would run the block eagerly from then on, with no more than a warning.
    """

    def patient(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=PLANS):  # noqa: SLF001 - it has no public name
            return forward(*args, **kwargs)

    return patient
