"""Example inputs as the arguments of a call, and the shapes of all that is in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_mp.nn.nested import tensors

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
