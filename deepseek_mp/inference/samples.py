"""The inputs of a batch for another number of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.costs.timing import is_out_of_memory
from deepseek_mp.errors import ConfigError, LoaderError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.nn.nested import map_leaves


def inputs_of(model: nn.Module, call: calls.Call, size: int) -> Any:
    """What the model is called with for so many samples: those of the batch, repeated where it has fewer.

    Returns:
        A tuple of positional or a mapping of keyword arguments. Tensors whose first dimension is not the samples stay.

    Raises:
        LoaderError: the batch has no sample.
        ConfigError: it has arguments of both kinds, or the inputs do not fit the memory.
    """
    has = calls.batch_size(call)
    if has == 0:
        raise LoaderError(explain("a first batch without samples", "one sample or more", "Let the loader give some"))

    def leaf(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dim() and value.shape[0] == has):
            return value
        return value.index_select(0, torch.arange(size, device=value.device) % has)  # which sparse tensors have too

    named = calls.keywords(model, call)  # before labels are another tensor than the target
    try:
        args, kwargs = map_leaves((call.args, named), leaf)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        passed = f"inputs of {size} samples, which alone are more than the memory"
        raise ConfigError(explain(passed, "sizes that fit", "Ask for fewer samples")) from error
    if args and kwargs:
        passed = "a batch of positional and keyword arguments"
        raise ConfigError(explain(passed, "one of the two", "Pass all by their names, as a mapping"))
    return kwargs or args
