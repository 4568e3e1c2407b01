"""The sums over every row that rounding errors are made of, as one Triton kernel instead of thirty operations.

It is for the host's sake: a probe of live precision compares hundreds of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.row_sums_kernel import row_sums_kernel

FIELDS = 11
BLOCK = 1024


def row_sums(x: Tensor, rounded: Tensor) -> Tensor:
    """See `ops.statistics.ROW_FIELDS`. A transposed view of x is read as it lies; `rounded` must lie alike."""
    ways = rounded if rounded.dim() == x.dim() + 1 else rounded[None]
    if ways.stride()[1:] != x.stride():
        x, ways = x.contiguous(), ways.contiguous()
    out = torch.empty((len(ways), x.shape[0], FIELDS), device=x.device)
    if out.numel():
        width = x.shape[1]
        sizes = {"FIELDS": FIELDS, "BLOCKS": -(-width // BLOCK), "BLOCK": BLOCK}
        with on_device(x.device):
            row_sums_kernel[(x.shape[0], len(ways))](x, ways, out, width, *x.stride(), ways.stride(0), **sizes)
    return out if rounded.dim() > x.dim() else out[0]
