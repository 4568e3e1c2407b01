"""The forms a saved tensor is held in until the backward; each gives it back by `restore`.

None of them refers to the autograd graph or to the session that made it, so that a graph that is dropped frees them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_mp.ops.packing import unpack_bits, unpack_groups


class Stored(Protocol):
    """A saved tensor in some form."""

    @property
    def nbytes(self) -> int:
        """Bytes that are held for it."""

    def restore(self) -> Tensor:
        """The tensor, in its dtype, shape and strides."""


class Geometry(NamedTuple):
    """How a dense tensor lies in memory, from its first value on."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Geometry:
        return cls(x.dtype, x.shape, x.stride())

    def shaped(self, flat: Tensor) -> Tensor:
        """Values in the order of memory [n] as the tensor."""
        return flat.as_strided(self.shape, self.stride)


class Kept:
    """The tensor itself, with PyTorch's check that it has not been written to since: hooks switch that off."""

    def __init__(self, x: Tensor) -> None:
        # Without its history: the tensor may be the result of the node that saves it.
        self._tensor = x.detach()
        self._version = version_of(x)
        self.nbytes = x.nbytes if x.layout is torch.strided else 0

    def restore(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was modified in place since it was saved.
        """
        check_version(self._tensor, self._version)
        return self._tensor


class Rounded:
    """FP8 values and scales of groups in the order of memory, and what is left of the last group as it is."""

    def __init__(self, values: Tensor, scale: Tensor, rest: Tensor | None, geometry: Geometry) -> None:
        """`values` [rows, group] and `scale` [1, rows] as `ops.schema.quantise` gives them; there may be rows more."""
        self._values, self._scale, self._rest, self._geometry = values, scale, rest, geometry
        self.nbytes = values.nbytes + scale.nbytes + (0 if rest is None else rest.nbytes)

    def restore(self) -> Tensor:
        """The rounded numbers, as a new tensor."""
        count, dtype = self._geometry.shape.numel(), self._geometry.dtype
        return self._geometry.shaped(unpack_groups(self._values, self._scale, self._rest, count, dtype))


class Bits:
    """A tensor of two values, zero and one other, in one bit each."""

    def __init__(self, packed: Tensor, geometry: Geometry, one: Tensor | None = None) -> None:
        """`packed` as `ops.packing.pack_bits` gives it; `one` the other value, of no dimension (None: 1 or True)."""
        self._packed, self._geometry, self._one = packed, geometry, one
        self.nbytes = packed.nbytes + (0 if one is None else one.nbytes)

    def restore(self) -> Tensor:
        """The tensor, exactly, or ones in the place of what is not zero."""
        count, dtype = self._geometry.shape.numel(), self._geometry.dtype
        return self._geometry.shaped(unpack_bits(self._packed, count, dtype, self._one))


def version_of(x: Tensor) -> int:
    """How often the values of a tensor, and of all that share them, were written to."""
    return x._version  # noqa: SLF001  what autograd's own check reads; it has no public name


def check_version(tensor: Tensor, version: int) -> None:
    """PyTorch's own error for a saved tensor that was written to."""
    if (now := version_of(tensor)) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {now}; expected version {version} instead. It was "
            "saved inside compressed_activations, which left it as it is. Use the operation that is not in place, or "
            "write to a clone."
        )
