"""What an exported program is called with: the structure, dtypes and sizes of its inputs, checked at each call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deepseek_mp.errors import BatchError, explain
from deepseek_mp.precision.checks import shown
from deepseek_mp.programs.conditions import holds, known, readable

Size = int | str
"""A number, or the name of one that is free, the same wherever the name stands."""


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One input: a tensor's dtype and sizes, or a value that the graph has in it."""

    where: str
    dtype: str | None = None
    shape: tuple[Size, ...] = ()
    value: Any = None

    def to_json(self) -> dict[str, Any]:
        if self.dtype is None:
            return {"where": self.where, "value": self.value}
        return {"where": self.where, "dtype": self.dtype, "shape": list(self.shape)}

    def __str__(self) -> str:
        if self.dtype is None:
            return f"{path_shown(self.where)} = {self.value!r}, which is part of the graph"
        return f"{path_shown(self.where)} {self.dtype} [{', '.join(map(str, self.shape))}]"

    def is_value(self, value: Any) -> bool:
        """Whether it is the value that the graph has in it."""
        if type(value) is not type(self.value):
            return False
        return bool(value == self.value) or (isinstance(value, float) and math.isnan(value) and math.isnan(self.value))


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The inputs of a program."""

    leaves: tuple[Leaf, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    """The least and largest size for each name; None: no largest."""
    conditions: tuple[str, ...] = ()
    """What the sizes have to meet beside it (see `conditions`)."""
    fixed_because: str = ""
    """Why no size is free, where one was asked for."""

    @property
    def is_free(self) -> bool:
        """Whether it takes inputs of more than one size."""
        return bool(self.ranges)

    def with_least(self, least: int) -> Self:
        """The same, with sizes from there where the exporter leaves it open; it says 2 whatever the model does."""
        ranges = {name: (least if low == 2 else low, high) for name, (low, high) in self.ranges.items()}
        return replace(self, ranges=ranges)

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """`BatchError` for inputs that the program was not made for."""
        self.check_leaves(leaves_of(args, kwargs))

    def check_leaves(self, found: Mapping[str, Any]) -> None:
        """The same of leaves by path."""
        if found.keys() != {leaf.where for leaf in self.leaves}:
            allowed = ", ".join(map(str, self.leaves))
            raise BatchError(
                explain(f"inputs {', '.join(map(path_shown, found)) or 'of no kind'}", allowed, "Pass those")
            )
        given = {leaf.where: found[leaf.where] for leaf in self.leaves}  # conditions go by their order
        sizes: dict[str, int] = {}
        for leaf, value in zip(self.leaves, given.values(), strict=True):
            if not self._fits(leaf, value, sizes):
                raise self._refused(f"input {path_shown(leaf.where)}, {described(value)}")
        numbers = {f"t{index}_{dim}": size for index, dim, size in _sizes(given)}
        for condition in self.conditions:
            if not holds(condition, numbers):
                asked = readable(condition, list(map(path_shown, given)))
                raise self._refused(", ".join(map(described, given.values())) + f", which are not as {asked}")

    def to_json(self) -> dict[str, Any]:
        return {
            "leaves": [leaf.to_json() for leaf in self.leaves],
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
            "conditions": list(self.conditions),
            "fixed_because": self.fixed_because,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """That which `to_json` wrote; `KeyError`, `TypeError` or `ValueError` for anything else."""
        ranges = _ranges(data["ranges"])
        leaves = tuple(_leaf(leaf, ranges) for leaf in data["leaves"])
        conditions = tuple(map(known, data["conditions"]))
        some = {f"t{index}_{dim}": 2 for index, leaf in enumerate(leaves) for dim in range(len(leaf.shape))}
        for condition in conditions:
            holds(condition, some)  # of sizes that there are
        return cls(leaves=leaves, ranges=ranges, conditions=conditions, fixed_because=data["fixed_because"])

    def __str__(self) -> str:
        free = [
            f"{name} from {low}" + ("" if high is None else f" to {high}") for name, (low, high) in self.ranges.items()
        ]
        return "; ".join([", ".join(map(str, self.leaves)), *free])

    def _refused(self, passed: str) -> BatchError:
        change = "Pass inputs like these, or make the model again with other example inputs"
        return BatchError(
            explain(passed, str(self), f"{change}. {self.fixed_because}" if self.fixed_because else change)
        )

    def _fits(self, leaf: Leaf, value: Any, sizes: dict[str, int]) -> bool:
        if leaf.dtype is None:
            return leaf.is_value(value)
        if not isinstance(value, Tensor) or dtype_name(value.dtype) != leaf.dtype or value.dim() != len(leaf.shape):
            return False
        return all(self._size_fits(size, found, sizes) for size, found in zip(leaf.shape, value.shape, strict=True))

    def _size_fits(self, size: Size, found: int, sizes: dict[str, int]) -> bool:
        if isinstance(size, int):
            return size == found
        least, most = self.ranges[size]
        return sizes.setdefault(size, found) == found and least <= found and (most is None or found <= most)


def _ranges(data: Any) -> dict[str, tuple[int, int | None]]:
    if not isinstance(data, dict):
        raise TypeError(f"a {type(data).__name__} as ranges")
    for least, most in data.values():
        if type(least) is not int or type(most) not in (int, type(None)):
            raise TypeError(f"a range from {least!r} to {most!r}")
    return {name: (least, most) for name, (least, most) in data.items()}


def _leaf(data: Mapping[str, Any], ranges: Mapping[str, Any]) -> Leaf:
    leaf = Leaf(**{**data, "shape": tuple(data.get("shape", ()))})
    if not isinstance(leaf.where, str):
        raise TypeError(f"an input at {leaf.where!r}")
    if not isinstance(leaf.dtype, str | None):
        raise TypeError(f"an input of the dtype {leaf.dtype!r}")
    for size in leaf.shape:
        if type(size) is not int and not (isinstance(size, str) and size in ranges):
            raise ValueError(f"an input with the size {size!r}")
    return leaf


def inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as a program takes them: in plain containers, whose names are in the order of the alphabet."""
    return tuple(_ordered(plain(arg)) for arg in args), _ordered(plain(kwargs))


def leaves_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of `inputs` by path, like "['args'][0]"."""
    return paths_of(dict(zip(("args", "kwargs"), inputs(args, kwargs), strict=True)))


def paths_of(tree: Any) -> dict[str, Any]:
    """The leaves of nested containers by path."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def path_shown(path: str) -> str:
    """As it is written in Python: a path begins with the name of an argument, in brackets and quotes."""
    return path.removeprefix("['").replace("']", "", 1) if path.startswith("['") else path


def plain(tree: Any) -> Any:
    """The structure in tuples, lists and dicts alone, which every machine knows."""
    if isinstance(tree, Tensor):
        return tree
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return tuple(plain(value) for value in tree) if isinstance(tree, tuple) else tree


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name, like 'float32'."""
    return str(dtype).removeprefix("torch.")


def described(value: Any) -> str:
    """A tensor's dtype and sizes, or the value; of what no program takes, the type."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return shown(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _sizes(given: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    for index, value in enumerate(given.values()):
        if isinstance(value, Tensor):
            yield from ((index, dim, size) for dim, size in enumerate(value.shape))


def _ordered(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _ordered(tree[key]) for key in sorted(tree, key=str)}
    return type(tree)(map(_ordered, tree)) if isinstance(tree, list | tuple) else tree
