"""Which sizes in other dimensions than the first may change too, though the exporter took them for constants.

The length of texts and the height and width of images change in training, and most graphs compute with whatever they
get. Others have the example's sizes in them, as divisors or in views. Which it is, is found out by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch.utils import _pytree as pytree

from deepseek_mp.programs.conditions import holds
from deepseek_mp.programs.samples import with_samples
from deepseek_mp.qat.size_conditions import SizeConditions, all_sizes

FEW = 2
"""Samples that are enough to see it, and quick."""

Same = Callable[[tuple[Any, ...], dict[str, Any]], bool | None]
Dimension = tuple[int, int]
"""Of an input's index, and of the place among its sizes."""


def with_free_dimensions(sizes: SizeConditions, example: Any, free: Mapping[int, int], same: Same) -> SizeConditions:
    """The same without the sizes that make no difference: each tried alone, and equal ones together.

    Those that may only change together, such as of a text and its mask, get a condition that says so.

    Args:
        sizes: of the graph.
        example: arguments and keyword arguments.
        free: the first sizes in it that may change, by the input's index.
        same: whether model and graph do the same with some arguments and keyword arguments; None where both fail.
    """
    leaves, spec = pytree.tree_flatten(_smaller(sizes, example, free))

    def are_free(dims: Sequence[Dimension], size: int) -> bool:
        found = {other: same(*pytree.tree_unflatten(_resized(leaves, dims, other), spec)) for other in _tries(size)}
        # With a size that is near, what the graph has in it may make a difference that is taken for rounding.
        return not any(one is False for one in found.values()) and any(found[far] for far in _far(size))

    groups: dict[int, list[Dimension]] = {}
    for index, dim, size in all_sizes(leaves):
        if dim and size:
            groups.setdefault(size, []).append((index, dim))
    changing: set[Dimension] = set()
    together: list[str] = []
    for size, dims in groups.items():
        alone = [one for one in dims if are_free([one], size)]
        changing.update(alone)
        if len(alone) < len(dims) > 1 and are_free(dims, size):
            changing.update(dims)
            together += (f"t{index}_{dim} == t{other}_{at}" for (index, dim), (other, at) in pairwise(dims))
    shapes = {path: _opened(shape, sizes.places[path], changing) for path, shape in sizes.shapes.items()}
    return replace(sizes, shapes=shapes, conditions=(*sizes.conditions, *together))


def _smaller(sizes: SizeConditions, example: Any, free: Mapping[int, int]) -> Any:
    """The example with few samples, if the model takes so few."""
    leaves, spec = pytree.tree_flatten(example)
    fewer = [with_samples(leaf, 0, FEW) if index in free else leaf for index, leaf in enumerate(leaves)]
    now = {f"t{index}_{dim}": size for index, dim, size in all_sizes(fewer)}
    return pytree.tree_unflatten(fewer, spec) if all(holds(one, now) for one in sizes.conditions) else example


def _resized(leaves: Sequence[Any], dims: Sequence[Dimension], size: int) -> list[Any]:
    found = list(leaves)
    for index, dim in dims:
        found[index] = with_samples(found[index], dim, size)
    return found


def _far(size: int) -> Iterator[int]:
    """Sizes that are another by far, or as far as there is one."""
    yield from {max(size // 2, 1), 2 * size} - {size}


def _tries(size: int) -> list[int]:
    return sorted({1, size - 1, size + 1, *_far(size)} - {0, size})


def _opened(shape: tuple[int | None, ...], index: int, changing: set[Dimension]) -> tuple[int | None, ...]:
    return tuple(None if (index, dim) in changing else size for dim, size in enumerate(shape))
