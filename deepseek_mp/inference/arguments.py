"""Example inputs as the arguments of a call, and the shapes of all that is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.nn.nested import map_leaves, tensors

Shapes = tuple[tuple[int, ...], ...]
"""Of the tensors of a call: positional arguments in order, then those by name, sorted."""


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple is the first, a mapping the second, all else is one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def shapes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes:
    """The shapes of all tensors of a call."""
    values = (*args, *(kwargs[name] for name in sorted(kwargs)))
    return tuple(tuple(tensor.shape) for tensor in tensors(values))


def clones(tree: Any) -> Any:
    """The same with copies of all tensors: outputs may be a model's state, which goes on changing."""
    return map_leaves(tree, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def undoing(inputs: Any) -> Callable[[], None]:
    """Makes the tensors in the inputs what they are now, whenever it is called: a forward may write to them."""
    mine = [tensor for tensor in tensors(inputs) if not tensor.is_inference()]
    kept = [(tensor, tensor.clone(), tensor._version) for tensor in mine]  # noqa: SLF001 - it has no public name

    def undo() -> None:
        with torch.no_grad():
            for tensor, before, version in kept:
                if tensor._version != version:  # noqa: SLF001 - and it stays another one from the first write on
                    tensor.copy_(before)

    return undo
