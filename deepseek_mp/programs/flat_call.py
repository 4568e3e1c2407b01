"""Whether a call's arguments are like those of an earlier one, told in a microsecond: for arguments without nesting.

The host does this before each replay of a recording, while the device waits, and in front of an INT8 model. Whole
signatures (`inference.graphed.signature`, `Signature`) tell of every call, and take several times as long. What is not
seen to be alike here may still have the same one: another object of an equal value, say, or a parameter in place of a
tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CONSTANT = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout))
"""Exactly these, whose objects never change."""
_STRIDED = torch.strided
_Place = tuple[Any, Any, Any, Any, Any]
"""A tensor's exact class, shape, strides, dtype and device; or None and the very object, and nothing more.

A plain tuple: Python takes one with names apart in twice the time."""


class FlatCall:
    """What calls have in common that are like this one: the keywords in their order, and each argument.

    Nothing is like a call in which there is more than dense tensors and constants.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places = [_place(leaf) for leaf in (*args, *kwargs.values())]
        self._names = tuple(kwargs)
        self._places = tuple(place for place in places if place is not None)
        self._count = len(places) if None not in places else -1

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Those of a call that is like this one, in order; None if it is not seen to be."""
        if kwargs or self._names:
            if tuple(kwargs) != self._names:
                return None
            args = (*args, *kwargs.values())
        if len(args) != self._count:
            return None
        found = []
        for leaf, (kind, like, stride, dtype, device) in zip(args, self._places, strict=False):  # counted above
            if kind is None:
                if leaf is not like:
                    return None
            elif (
                type(leaf) is kind
                and leaf.dtype is dtype
                and leaf.shape == like
                and leaf.layout is _STRIDED  # before the strides, which not all layouts have
                and leaf.stride() == stride
                and leaf.device == device
            ):
                found.append(leaf)
            else:
                return None
        return found


class LastCall:
    """The call that was checked last: one like it is right too, and is told in a microsecond."""

    def __init__(self) -> None:
        self._flat: FlatCall | None = None

    def is_like(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call is seen to be like it."""
        return self._flat is not None and self._flat.tensors(args, kwargs) is not None

    def remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """This call was checked now."""
        self._flat = FlatCall(args, kwargs)


def _place(leaf: Any) -> _Place | None:
    if type(leaf) in _CONSTANT:
        return None, leaf, None, None, None
    if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout is not _STRIDED:
        return None
    return type(leaf), tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
