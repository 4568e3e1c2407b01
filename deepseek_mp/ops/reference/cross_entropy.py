"""Cross entropy of some rows of logits and its gradient, in plain PyTorch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_rows(
    logits: Tensor, labels: Tensor, smoothing: float, factors: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `ops.cross_entropy`."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z -= z.amax(-1, keepdim=True)
    wanted = z.gather(-1, labels.unsqueeze(-1))
    if smoothing:
        wanted = (1.0 - smoothing) * wanted + smoothing * z.mean(-1, keepdim=True)
    total = z.exp_().sum(-1, keepdim=True)
    losses = (total.log() - wanted).squeeze(-1)
    if factors is None:
        return losses, None
    factor = factors.unsqueeze(-1)
    gradient = z.mul_(factor / total)
    gradient.scatter_add_(-1, labels.unsqueeze(-1), factor * (smoothing - 1.0))
    if smoothing:
        gradient -= factor * (smoothing / gradient.shape[-1])
    return losses, gradient.to(logits.dtype)
