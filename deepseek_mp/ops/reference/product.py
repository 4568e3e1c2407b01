"""`product` in plain PyTorch: operands taken back to fp32, then an ordinary product."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.layouts import alignment


@torch.no_grad()
def product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    pair: tuple[str, str],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `ops.schema.product`."""
    # On CUDA fp32 products may be TF32 by a flag of the process; fp64 ones are what they say.
    wide = torch.float64 if left.is_cuda else torch.float32
    with torch.autocast(left.device.type, enabled=False):
        a = dequantise(left, left_scale, pair[0]).to(wide)
        b = dequantise(right, right_scale, pair[1]).to(wide)
        out = a @ b.t()
    return (out if bias is None else out + bias).to(dtype)


def dequantise(values: Tensor, scale: Tensor, granularity: str) -> Tensor:
    """The numbers an operand [outer, contraction] stands for, in fp32."""
    wide = values.float()
    if granularity == "tensor":
        return wide * scale
    if granularity == "row":
        return wide * scale[:, None]
    block = alignment(granularity)
    if granularity == "128x128":
        return wide * scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return wide * scale.t().repeat_interleave(block, 1)
