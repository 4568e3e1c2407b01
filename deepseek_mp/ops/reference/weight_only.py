"""`weight_only_linear` in plain PyTorch: the weight is widened to fp32 in memory, for any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def weight_only_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.weight_only.weight_only_linear`. A scale is the same along the whole sum, so it leaves the sum."""
    out = F.linear(x.float(), q.float()).mul_(scale)
    return (out if bias is None else out.add_(bias)).to(x.dtype)
