"""The forms a saved tensor is held in until the backward; each gives it back by `restore`.

None of them refers to the autograd graph or to the session that made it, so that a graph that is dropped frees them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_mp.ops.reference.product import dequantise

PIECE = 1 << 22
"""Values that are brought into another form at once: a multiple of the rows that a cast adds up to."""


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

    def __init__(self, values: Tensor, scale: Tensor, rest: Tensor, geometry: Geometry) -> None:
        """`values` [rows, group] and `scale` [1, rows] as `ops.schema.quantise` gives them; there may be rows more."""
        self._values, self._scale, self._rest, self._geometry = values, scale, rest, geometry
        self.nbytes = values.nbytes + scale.nbytes + rest.nbytes

    @torch.no_grad()
    def restore(self) -> Tensor:
        """The rounded numbers, as a new tensor."""
        rows, group = self._values.shape
        count = self._geometry.shape.numel()
        whole = count - self._rest.numel()
        flat = torch.empty(count, dtype=self._geometry.dtype, device=self._values.device)
        step = PIECE // group
        for start in range(0, rows, step):
            # In pieces, so that no FP32 tensor of the full size is needed beside it.
            piece = dequantise(self._values[start : start + step], self._scale[:, start : start + step], f"1x{group}")
            part = flat[start * group : min(start * group + piece.numel(), whole)]
            part.copy_(piece.flatten()[: part.numel()])
        flat[whole:] = self._rest
        return self._geometry.shaped(flat)


class Bits:
    """A tensor of two values, zero and one other, in one bit each."""

    def __init__(self, mask: Tensor, geometry: Geometry, one: Tensor | None = None) -> None:
        """`mask` is bool [n], in the order of memory; `one` the other value, of no dimension (None: 1 or True)."""
        self._packed, self._geometry, self._one = _packed(mask), geometry, one
        self.nbytes = self._packed.nbytes + (0 if one is None else one.nbytes)

    @torch.no_grad()
    def restore(self) -> Tensor:
        """The tensor, exactly, or ones in the place of what is not zero."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self._packed.device)
        bits = self._packed[:, None].bitwise_right_shift(shifts).bitwise_and_(1).flatten()
        flat = bits[: self._geometry.shape.numel()].to(self._geometry.dtype)
        return self._geometry.shaped(flat if self._one is None else flat * self._one)


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


def _packed(mask: Tensor) -> Tensor:
    """bool [n] as uint8 [n / 8], rounded up."""
    count = mask.numel()
    bits = mask.new_zeros((count + 7) // 8 * 8, dtype=torch.uint8)
    bits[:count] = mask
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.view(-1, 8).bitwise_left_shift(shifts).sum(1, dtype=torch.uint8)
