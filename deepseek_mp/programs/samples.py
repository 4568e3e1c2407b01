"""Inputs with another number of samples, made of those at hand."""

from __future__ import annotations

import torch
from torch import Tensor


def with_samples(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with so many samples along a dimension, those at hand again and again.

    Args:
        tensor: of any dtype, with one sample or more.
        dim: where its samples are.
        size: how many there are to be.
    """
    return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
