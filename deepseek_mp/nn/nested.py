"""Walks nested tuples, lists and mappings: what a batch, and a module's inputs, are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain


def map_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with `change(leaf)` in place of every leaf; containers keep their type.

    Leaves are everything but tuples, lists, mappings and dataclasses. A container with a `to` method of its own
    (a packed sequence, a tokenizer's output) is a leaf too: it knows better how to change itself. A dataclass in which
    nothing changes is itself.
    """
    if isinstance(tree, Tensor) or hasattr(tree, "to"):
        return change(tree)
    if not isinstance(tree, tuple | list | Mapping):
        # Not `is_dataclass`, which compilers trace through; and it takes a class itself for one.
        return _map_fields(tree, change) if hasattr(type(tree), "__dataclass_fields__") else change(tree)
    if isinstance(tree, Mapping):
        return _map_mapping(tree, change)
    items = [map_leaves(item, change) for item in tree]
    if hasattr(tree, "_fields"):  # a namedtuple takes its fields one by one
        return type(tree)(*items)
    return type(tree)(items)


def check_nesting(tree: Any, what: str) -> None:
    """`ConfigError` for a container that holds itself, which has no end.

    Args:
        tree: nested tuples, lists, mappings and dataclasses.
        what: it is, for the error.
    """
    _check_nesting(tree, what, ())


def _check_nesting(tree: Any, what: str, around: tuple[Any, ...]) -> None:
    items = _items(tree)
    if items and any(tree is one for one in around):
        passed, allowed = f"{what} with a {type(tree).__name__} that holds itself", "containers that have an end"
        raise ConfigError(explain(passed, allowed, "Leave it out of itself"))
    for item in items:
        _check_nesting(item, what, (*around, tree))


def _map_mapping(tree: Mapping[Any, Any], change: Callable[[Any], Any]) -> Mapping[Any, Any]:
    items = {key: map_leaves(item, change) for key, item in tree.items()}
    if type(tree) is dict or not isinstance(tree, MutableMapping):
        return items
    same = copy.copy(tree)  # not type(tree)(items): a defaultdict, for one, takes other arguments
    for key, item in items.items():
        same[key] = item
    return same


def _map_fields(tree: Any, change: Callable[[Any], Any]) -> Any:
    had = _fields(tree)
    made = {name: map_leaves(value, change) for name, value in had.items()}
    if _is_same(made, had):
        return tree
    same = copy.copy(tree)  # not `replace`, which runs its `__init__` again
    for name, value in made.items():
        object.__setattr__(same, name, value)  # also of frozen ones
    return same


def _fields(tree: Any) -> dict[str, Any]:
    """Of a dataclass, by name, and what else it holds; fields of `init=False` may have no value."""
    found = {field.name: getattr(tree, field.name) for field in fields(tree) if hasattr(tree, field.name)}
    if torch.compiler.is_compiling() or not hasattr(tree, "__dict__"):
        return found  # slots have none, and PyTorch 2.11 does not trace it
    return {**found, **vars(tree)}


def _is_same(made: Any, had: Any) -> bool:
    """Whether no leaf is another: tuples, lists and mappings are made anew all the same."""
    if isinstance(had, Mapping) and isinstance(made, Mapping):
        return all(_is_same(made[key], item) for key, item in had.items())
    if isinstance(had, tuple | list) and isinstance(made, tuple | list):
        return all(_is_same(one, other) for one, other in zip(made, had, strict=True))
    return made is had


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor in order, or None."""
    return next(tensors(tree), None)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for item in _items(tree):
        yield from tensors(item)


def _items(tree: Any) -> Collection[Any]:
    """What a container holds; nothing in a leaf."""
    if isinstance(tree, Mapping):
        return tree.values()
    if isinstance(tree, tuple | list):
        return tree
    return _fields(tree).values() if hasattr(type(tree), "__dataclass_fields__") else ()


def numbers(tree: Any) -> Iterator[Tensor]:
    """The numbers among them that can be non-finite, as dense tensors; of sparse tensors their values."""
    for tensor in tensors(tree):
        if tensor.is_floating_point() or tensor.is_complex():
            summed = tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor
            yield summed if summed.layout == torch.strided else summed.values()
