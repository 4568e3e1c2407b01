"""Refuses casts of a model whose form, or file, says what its tensors are kept in; what moves them is let through."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.inference.stored_layer import StoredLayer


def check_no_cast(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor], what: str) -> None:
    """`ConfigError` where `fn`, which `nn.Module._apply` is about to run, would give a tensor another dtype.

    It is asked of empty tensors, before the first weight is another: half a model cast would be of no use.

    Args:
        fn: from a tensor to what takes its place.
        tensors: those that it would be run on.
        what: the model, for the error.
    """
    for dtype, device in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
        found = fn(torch.empty(0, dtype=dtype, device=device)).dtype
        if found is not dtype:
            passed = f"a cast from {_name(dtype)} to {_name(found)} of {what}"
            change = "Serve the original model in another form, or move this one without a dtype"
            raise ConfigError(explain(passed, "the formats that it is served in", change))


def cast_with(model: nn.Module, taken: torch.dtype | None) -> list[Tensor]:
    """The tensors of a model that casts would reach: not what layers store in fewer bits.

    Args:
        model: served.
        taken: what inputs are made; a tensor of it is among those given, since all weights may be stored. None: no one.
    """
    stored = {id(one) for part in model.modules() if isinstance(part, StoredLayer) for one in part.buffers()}
    found = [one for one in (*model.parameters(), *model.buffers()) if id(one) not in stored]
    return found if taken is None else [*found, torch.empty(0, dtype=taken)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
