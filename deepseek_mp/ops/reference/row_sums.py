"""The sums over every row that rounding errors are made of, in plain PyTorch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(x: Tensor, rounded: Tensor) -> Tensor:
    """See `ops.statistics.ROW_FIELDS`."""
    x, rounded = x.float(), rounded.float()
    finite, kept = x.abs() < float("inf"), rounded.abs() < float("inf")
    dropped = ~(finite & kept)
    error, value = (rounded - x).masked_fill_(dropped, 0.0), x.masked_fill(dropped, 0.0)
    nonzero = value != 0
    ratio = (error / value).masked_fill_(value == 0, 0.0).clamp_(-1, 1)
    parts = [
        error.square().sum(-1),
        value.square().sum(-1),
        ratio.sum(-1),
        ratio.square().sum(-1),
        (ratio * value.sign()).sum(-1),
        nonzero.sum(-1),
        (nonzero & (rounded == 0)).sum(-1),
        (finite & dropped).sum(-1),
        finite.expand_as(dropped).sum(-1),
        value.abs().sum(-1),
        (error + value).abs_().sum(-1),
    ]
    return torch.stack([part.float() for part in parts], dim=-1)
