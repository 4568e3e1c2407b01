"""What modules keep in attributes that are neither parameters nor buffers, put back after something was tried.

A count of calls, the hidden state of the last batch, a list of losses, a generator of the model's own: a forward that
is only tried must not move them either. An optimizer keeps such things too.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepseek_mp.nn.convert import IN_FORCE

_PLAIN = (bool, int, float, complex, str, type(None))
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_REFILLED = (list, set, deque, *_MAPPINGS)
_CONTAINERS = (tuple, *_REFILLED)
_NOT_KEPT = frozenset(vars(nn.Module())) | {"_compiled_call_impl", *IN_FORCE}
"""What every module has, and what conversion and compilation put there: those who do that take it back themselves."""

PutBack = Callable[[], object]


class Attributes:
    """The attributes of modules, or other objects, at one moment: numbers, flags and text; tensors, with their values;
    what lists, dictionaries, sets, queues and tuples hold, also inside of one another; and the states of random
    generators.

    Not kept are values inside of other objects, and attributes that are made later.

    Args:
        owners: whose attributes.
        passed_over: names that somebody else keeps; as a rule what every module has.
    """

    def __init__(self, owners: Iterable[object], passed_over: Collection[str] = _NOT_KEPT) -> None:
        seen: set[int] = set()
        found = [
            (owner, name, value, _inside(value, seen))
            for owner in owners
            for name, value in vars(owner).items()
            if name not in passed_over
        ]
        self._kept = [kept for kept in found if isinstance(kept[2], _PLAIN) or kept[3] is not None]

    def put_back(self) -> None:
        """Make them what they were; one that is gone stays so."""
        for owner, name, value, inside in self._kept:
            if name in vars(owner):
                vars(owner)[name] = value
            if inside is not None:
                inside()


def _inside(value: Any, seen: set[int]) -> PutBack | None:
    """What puts back the inside of an object; None for one that is not known to have any.

    `seen` has those that are put back already: a container may hold itself, and two of them the same tensor.
    """
    if isinstance(value, _PLAIN):
        return None
    if id(value) in seen:
        return _nothing
    found: list[PutBack] = []
    left = [value]  # and no recursion: a history may be a chain of thousands
    while left:
        one = left.pop()
        if isinstance(one, _PLAIN) or id(one) in seen:
            continue
        put_back, items = _container(one) if isinstance(one, _CONTAINERS) else (_single(one), ())
        if put_back is not None:
            seen.add(id(one))
            found.append(put_back)
            left.extend(items)
    return partial(_all, found) if found else None


def _all(found: Iterable[PutBack]) -> None:
    for put_back in found:
        put_back()


def _nothing() -> None:
    pass


def _single(value: Any) -> PutBack | None:
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _tensor(tensor: Tensor) -> PutBack | None:
    """Of an ordinary tensor the values, where somebody has written to it."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_inference():
        return None
    version, kept = tensor._version, tensor.detach().clone()  # noqa: SLF001 - there is no public one

    @torch.no_grad()
    def put_back() -> None:
        if tensor._version != version:  # noqa: SLF001
            tensor.copy_(kept)

    return put_back


def _container(value: Any) -> tuple[PutBack | None, Iterable[Any]]:
    """What fills it again, and what it holds."""
    if isinstance(value, tuple):
        return _nothing, value
    kind = type(value)
    if kind not in _REFILLED:
        return None, ()
    kept = copy.copy(value)

    def put_back() -> None:
        value.clear()
        value.extend(kept) if kind in (list, deque) else value.update(kept)

    return put_back, kept.values() if isinstance(kept, dict) else kept
