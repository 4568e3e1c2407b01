"""Which BF16 parameters are looked after: an optimizer that writes them without losing small updates says so here.

A model whose trained weights are in BF16 loses small updates with any other optimizer, so nothing else in the package
accepts such weights. The mark is on the parameter, and is not copied with it: a copy has no optimizer yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.precision.storage import StorageFormat

_MARK = "deepseek_mp_storage"


class _Mark:
    """The value of a mark. `deepcopy` drops attributes of tensors, and pickles keep them: there it becomes nothing."""

    def __init__(self, format: StorageFormat) -> None:
        self.format = format

    def __reduce__(self) -> tuple[type[set[Any]], tuple[()]]:
        return set, ()  # a type that `torch.load` makes without being told that it may


def mark_storage(parameter: Tensor, format: StorageFormat) -> None:
    """Say how the parameter is stored from now on."""
    if format.is_bf16:
        setattr(parameter, _MARK, _Mark(format))
    else:
        unmark(parameter)


def mark_master(parameter: Tensor) -> None:
    """Say that an optimizer keeps the FP32 weight that a BF16 parameter is rounded from."""
    if parameter.dtype is torch.bfloat16:
        setattr(parameter, _MARK, _Mark(StorageFormat.FP32))


def unmark(parameter: Tensor) -> None:
    """Say that nobody looks after the parameter any more."""
    parameter.__dict__.pop(_MARK, None)


def storage_of(parameter: Tensor) -> StorageFormat | None:
    """How the parameter is stored; None for a dtype that is no storage format, and for BF16 that nobody looks after.

    FP32 for one in BF16 that has an FP32 master.
    """
    if parameter.dtype is torch.float32:
        return StorageFormat.FP32
    marked = parameter.__dict__.get(_MARK)
    return marked.format if parameter.dtype is torch.bfloat16 and isinstance(marked, _Mark) else None


def take_gradients(parameters: Iterable[Tensor], *, add_up: bool) -> None:
    """Say in which dtype BF16 parameters that are looked after get their next gradients.

    Args:
        add_up: over several backwards, which is lossless in FP32 only. The gradient of one backward is computed in
            BF16, and FP32 would hold the same numbers in twice the memory.
    """
    wanted = torch.float32 if add_up else torch.bfloat16
    for parameter in parameters:
        if parameter.dtype is not torch.bfloat16 or parameter.grad is not None:
            continue
        found = storage_of(parameter)
        if found is not None and found.is_bf16:
            parameter.grad_dtype = wanted
