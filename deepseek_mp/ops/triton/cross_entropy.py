"""Cross entropy of some rows of logits and its gradient as one Triton kernel, in the memory of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.triton.cross_entropy_kernel import cross_entropy_kernel
from deepseek_mp.ops.triton.current_device import on_device

BLOCK = 4096


def cross_entropy_rows(
    logits: Tensor, labels: Tensor, smoothing: float, factors: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `ops.cross_entropy`. Rows have to be contiguous."""
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        sizes = {"GRADIENT": factors is not None, "BLOCKS": -(-classes // BLOCK), "BLOCK": BLOCK}
        with on_device(logits.device):
            cross_entropy_kernel[(rows,)](
                logits, labels, losses if factors is None else factors, losses, classes, logits.stride(0),
                float(smoothing), **sizes, num_warps=8,
            )  # fmt: skip
    return losses, None if factors is None else logits
