"""Compile a model whole, or its repeated blocks once each kind.

A deep model is mostly one block repeated. Compiling the block costs a fraction of compiling the model,
and the compiled code is shared by all its copies, since their parameters are inputs to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.trainer.config import Compile


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that stand two or more times, with equal class, in one list of the model.

    A list is a ModuleList or a Sequential; a block is a child of one that has children of its own.
    """
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            kinds: dict[type, list[nn.Module]] = defaultdict(list)
            for block in child:
                if next(block.children(), None) is not None:
                    kinds[type(block)].append(block)
            alike = [block for blocks in kinds.values() if len(blocks) > 1 for block in blocks]
            found += alike
            rest = [block for block in child if not any(block is a for a in alike)]
            for block in rest:
                found += repeated_blocks(nn.ModuleList([block]) if isinstance(block, nn.Sequential) else block)
        else:
            found += repeated_blocks(child)
    return list(dict.fromkeys(found))


def compiled_forward(model: nn.Module, how: Compile) -> Callable[..., Any]:
    """What to call instead of the model. 'regional' compiles the blocks in place.

    Raises:
        ConfigError: 'regional' on a model without repeated blocks.
    """
    if how is False:
        return model
    if how is True:
        return torch.compile(model)
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError(
            explain(
                "compile='regional' on a model without repeated blocks",
                "two or more modules of one class in a ModuleList or Sequential",
                "Use compile=True",
            )
        )
    for block in blocks:
        block.compile()
    return model
