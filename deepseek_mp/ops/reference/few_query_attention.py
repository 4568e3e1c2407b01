"""`few_query_attention` in plain PyTorch: scores in fp32 in memory, for any device."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def few_query_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `ops.few_query_attention.few_query_attention`."""
    batch, heads, queries, width = query.shape
    shared = key.shape[1]
    together = heads // shared * queries
    rows = query.float().reshape(batch, shared, together, width)
    scores = (rows @ key.float().transpose(2, 3)).mul_(scale).view(batch, heads, queries, key.shape[2])
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else scores.add_(mask)
    blind = (scores == -torch.inf).all(3, keepdim=True)
    weights = scores.softmax(3).masked_fill_(blind, 0.0).view(batch, shared, together, key.shape[2])
    mixed = (weights @ value.float()).view(batch, heads, queries, value.shape[3])
    out = query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)
    return out.copy_(mixed)
