"""Tensors that lie beside each other in one memory, so that they can be read as one without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


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
