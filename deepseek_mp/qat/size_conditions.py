"""What a model's graph takes from its example inputs, and other inputs need to have: sizes, and values of other kinds.

The code of a model asks of the sizes of its inputs, and the graph has the answers for the example inputs alone.

The exporter writes down what was asked, and so do operations that ask for themselves, such as whether a slice has one
row. Most of that makes no difference to what comes out; what does is found out by trying.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from deepseek_mp.errors import BatchError, explain
from deepseek_mp.programs.conditions import holds, moved, named, readable
from deepseek_mp.programs.flat_call import LastCall
from deepseek_mp.programs.samples import with_samples
from deepseek_mp.programs.signature import Leaf, described, path_shown, paths_of
from deepseek_mp.qat.first_dimensions import equal_sizes, free_inputs, order_of

MOST = 16
"""Up to here all sizes are tried."""
LARGE = 33
"""Is tried as well: at `MOST` what is asked of larger sizes may not show."""
SHOWN = 5
"""Conditions in a message: a model that folds frames into clips has dozens."""
UNASKED = (0, 1)
"""Sizes that the exporter does not ask about: it takes none of them for a size that is free."""


@dataclass(frozen=True, kw_only=True)
class SizeConditions:
    """Those of the first dimensions of a forward's inputs, which go by their order in its example inputs.

    `check` also tells of what is part of the graph and cannot change: which inputs there are, values other than
    tensors, and all other sizes.
    """

    parameters: inspect.Signature
    """Of the forward, by name and kind."""
    places: Mapping[str, int]
    """The index of each input by its path, which begins with a parameter."""
    conditions: tuple[str, ...]
    """What sizes have to meet (see `programs.conditions`)."""
    constants: tuple[Leaf, ...] = ()
    """The inputs that are no tensors."""
    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    """The sizes of the others by path; None for one that may change."""
    idle: frozenset[str] = frozenset()
    """What was asked as well, and makes no difference."""
    _last: LastCall = field(default_factory=LastCall, init=False, repr=False, compare=False)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`BatchError` for a call at which the model's code would go another way than the graph."""
        if self._last.is_like(args, kwargs):
            return
        found = self._found(args, kwargs)
        self._check_fixed(found)
        sizes, names = self._sizes(found), list(map(path_shown, self.places))
        for condition in self.conditions:
            if not _meets(sizes, condition):
                passed = f"inputs that are not as {readable(condition, names)}, which the example inputs were"
                more = len(self.conditions) - SHOWN
                allowed = " and ".join(readable(one, names) for one in self.conditions[:SHOWN])
                allowed += f" and {more} more of the kind" if more > 0 else ""
                raise _refused(passed, allowed)
        self._last.remember(args, kwargs)

    def takes(self, name: str) -> bool:
        """Whether the example inputs had something for this parameter."""
        return any(_parameter(path) == name for path in self.places)

    def without_idle(
        self,
        example: tuple[tuple[Any, ...], dict[str, Any]],
        free: Mapping[int, int],
        same: Callable[[tuple[Any, ...], dict[str, Any]], bool | None],
    ) -> SizeConditions:
        """Those that make a difference at a size that is tried, and those that no such size breaks.

        Args:
            example: arguments and keyword arguments.
            free: the sizes in it that may change, by the input's index. Each is changed alone, equal ones together,
                and all of them to one size and in proportion.
            same: whether model and graph do the same with some arguments and keyword arguments.
        """
        own = {f"t{index}_{dim}": size for index, dim, size in all_sizes(pytree.tree_leaves(example))}
        unasked = [f"t{index}_0 != {size}" for index in free for size in UNASKED]
        asked = tuple(dict.fromkeys((*self.conditions, *unasked)))
        refused: list[frozenset[str]] = []
        fine: list[frozenset[str]] = []
        for tried in _tries(free):
            sizes = {**own, **{f"t{index}_0": size for index, size in tried.items()}}
            broken = frozenset(one for one in asked if not holds(one, sizes))
            # A set that made no difference at one size is tried at others too, where it may.
            if broken and not any(one <= broken for one in refused):
                (fine if same(*_resized(example, tried)) else refused).append(broken)
        idle: frozenset[str] = frozenset()
        for broken in fine:
            wider = idle | broken
            if not any(one <= wider for one in refused):
                idle = wider
        return replace(self, conditions=tuple(one for one in asked if one not in idle), idle=idle)

    def of(self, program: ExportedProgram, kwargs: Mapping[str, Any], own: tuple[str, ...]) -> tuple[str, ...]:
        """All conditions on the inputs of a program, in its order.

        Args:
            program: exported with the example inputs.
            kwargs: those of them with names.
            own: what it asks itself.
        """
        order = order_of(program, kwargs)
        idle = {moved(one, order) for one in self.idle}
        asked = (moved(one, order) for one in self.conditions)
        return tuple(dict.fromkeys((*asked, *(one for one in own if one not in idle))))

    def _found(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs by path; `BatchError` for other ones than in the examples."""
        allowed = ", ".join(map(path_shown, self.places))
        try:
            found = paths_of(self.parameters.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise _refused(f"a call that does not fit ({error})", allowed) from error
        if Counter(map(_parameter, found)) != Counter(map(_parameter, self.places)):
            raise _refused(f"inputs {', '.join(map(path_shown, found)) or 'of no kind'}", allowed)
        return found

    def _check_fixed(self, found: Mapping[str, Any]) -> None:
        """`BatchError` for values and sizes that are part of the graph."""
        for leaf in self.constants:
            value = found.get(leaf.where, leaf.value)
            if not leaf.is_value(value):
                raise _refused(f"input {path_shown(leaf.where)}, {described(value)}", str(leaf))
        for path, shape in self.shapes.items():
            if path in found and not _has_shape(found[path], shape):
                sizes_shown = ", ".join("any" if size is None else str(size) for size in shape)
                name = path_shown(path)
                raise _refused(f"input {name}, {described(found[path])}", f"{name} with sizes [{sizes_shown}]")

    def _sizes(self, found: Mapping[str, Any]) -> dict[str, int]:
        leaves = [found.get(path) for path in self.places]
        return {f"t{index}_{dim}": size for index, dim, size in all_sizes(leaves)}


def asked_by(
    program: ExportedProgram, forward: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SizeConditions:
    """All that was asked while a model was exported.

    Args:
        program: the model's.
        forward: of the model.
        args: of the example inputs.
        kwargs: the others.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    by_place, by_name = pytree.tree_unflatten(list(range(len(leaves))), spec)
    indices = paths_of(forward.bind(*by_place, **by_name).arguments)
    places = {path: indices[path] for path in sorted(indices, key=indices.__getitem__)}
    free = free_inputs(program, args, kwargs)
    conditions: list[str] = []
    for guard in program._guards_code:  # noqa: SLF001 - nothing public says what was assumed
        try:
            conditions.append(named(guard, places))
        except ValueError:  # what cannot be checked holds for the sizes of now
            conditions += [f"t{index}_0 == {size}" for index, size in free.items()]
    conditions += (one for one in equal_sizes(program, kwargs) if one not in map(_turned, conditions))
    parameters = [inspect.Parameter(one.name, one.kind, default=_default(one)) for one in forward.parameters.values()]
    tensors = {path: index for path, index in places.items() if isinstance(leaves[index], Tensor)}
    return SizeConditions(
        parameters=inspect.Signature(parameters),
        places=places,
        conditions=tuple(dict.fromkeys(conditions)),
        constants=tuple(Leaf(where=path, value=leaves[index]) for path, index in places.items() if path not in tensors),
        shapes={path: _shape(leaves[index], index in free) for path, index in tensors.items()},
    )


def _refused(passed: str, allowed: str) -> BatchError:
    return BatchError(explain(passed, allowed, "Pass such batches, or prepare the model with other examples"))


def _shape(example: Tensor, free: bool) -> tuple[int | None, ...]:
    return (None, *example.shape[1:]) if free else tuple(example.shape)


def _has_shape(value: Any, shape: tuple[int | None, ...]) -> bool:
    found = value.shape if isinstance(value, Tensor) else None
    if found is None or len(found) != len(shape):
        return False
    return all(size in (None, one) for size, one in zip(shape, found, strict=True))


def _parameter(path: str) -> str:
    """Of the forward, with which the path of an input begins."""
    return path.removeprefix("['").partition("']")[0]


def _meets(sizes: Mapping[str, int], condition: str) -> bool:
    try:
        return holds(condition, sizes)
    except ValueError:  # an input is left out, or is no tensor with that dimension
        return False


def _turned(equality: str) -> str:
    return " == ".join(reversed(equality.split(" == ")))


def _default(parameter: inspect.Parameter) -> Any:
    """Whether there is one, without holding on to it."""
    return parameter.default if parameter.default is inspect.Parameter.empty else None


def _tries(free: Mapping[int, int]) -> Iterator[dict[int, int]]:
    groups = dict.fromkeys(free.values())
    together = [[index for index, now in free.items() if now == group] for group in groups]
    changed = dict.fromkeys(map(tuple, [*together, *([index] for index in free), list(free)]))
    # Those first that break least: others are not tried where these are refused.
    sizes = (*range(2, MOST + 1), LARGE, *UNASKED)
    for indices in changed:
        for size in sizes:
            yield dict.fromkeys(indices, size)
    if len(groups) > 1:
        unit = math.gcd(*groups)
        for size in sizes:
            if size * max(groups) <= MOST * unit:
                yield {index: size * (now // unit) for index, now in free.items()}


def _resized(example: Any, sizes: Mapping[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves, spec = pytree.tree_flatten(example)
    changed = [with_samples(leaf, 0, sizes[index]) if index in sizes else leaf for index, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(changed, spec)
    return args, kwargs


def all_sizes(leaves: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Of the tensors among them: the index, and each dimension with its size."""
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            yield from ((index, dim, size) for dim, size in enumerate(leaf.shape))
