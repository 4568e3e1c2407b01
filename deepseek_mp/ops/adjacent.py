"""Tensors that lie beside each other in one memory, so that they can be read as one without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_memories: WeakValueDictionary[tuple[torch.device, int], Tensor] = WeakValueDictionary()
"""By where they begin, memories as tensors of bytes, as long as somebody has them."""


@dataclass(frozen=True)
class Part:
    """A tensor as a part of its memory, for copies and pickles: those of one memory have it once, beside each other.

    Python's own pickles of tensors hold for each of them all of the memory that it is in.
    """

    memory: Tensor
    """All of it, in bytes; the same object for all parts."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Part | Tensor:
        """The tensor itself where it is all that is in its memory, or of a class of its own.

        FP8 never is: of it Python's pickles cannot be read again (PyTorch 2.13).
        """
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        is_fp8 = tensor.is_floating_point() and tensor.dtype.itemsize == 1
        if storage.nbytes() == tensor.nbytes and not is_fp8:
            return tensor
        at = tensor.device, storage.data_ptr()
        memory = _memories.get(at)
        if memory is None or memory.nbytes != storage.nbytes():
            memory = _memories[at] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        return cls(memory, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def tensor(self) -> Tensor:
        """A view of the memory."""
        return self.memory.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


def laid_out(parts: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Copies of the tensors that lie beside each other: views of what `torch.cat` makes of them along `dim`."""
    whole = torch.cat([part.detach() for part in parts], dim)
    return list(whole.split([part.shape[dim] for part in parts], dim))


def together(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor of which these are the parts along `dim`, in this order; a view. None if they do not lie like that."""
    first = parts[0]
    stride = first.stride()
    if not all(_alike(first, part, dim) for part in parts[1:]):
        return None
    for left, right in pairwise(parts):
        if right.storage_offset() - left.storage_offset() != left.shape[dim] * stride[dim]:
            return None
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.detach().as_strided(shape, stride, first.storage_offset())


def _alike(one: Tensor, other: Tensor, dim: int) -> bool:
    """Whether the other differs in its place and in the size of `dim` at most, and is of the same memory."""
    if (one.dtype, one.device, one.layout) != (other.dtype, other.device, other.layout):
        return False
    if one.layout is not torch.strided or one.dim() != other.dim() or one.stride() != other.stride():
        return False
    if any(left != right for at, (left, right) in enumerate(zip(one.shape, other.shape, strict=True)) if at != dim):
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
