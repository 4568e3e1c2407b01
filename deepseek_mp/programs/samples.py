"""Inputs with another number of samples, made of those at hand."""

from __future__ import annotations

import torch
from torch import Tensor


def with_samples(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with so many samples along a dimension: the first of those at hand, then some of them again.

    Which come again is drawn, the same in every call: in a period they would look alike when they are shifted or
    turned round.

    Args:
        tensor: of any dtype, with one sample or more.
        dim: where its samples are.
        size: how many there are to be.
    """
    count = tensor.shape[dim]
    again = torch.randint(count, (max(size - count, 0),), generator=torch.Generator().manual_seed(0))
    return tensor.index_select(dim, torch.cat([torch.arange(min(size, count)), again]).to(tensor.device))
