"""`fp8_linear` in plain PyTorch: rows rounded as the reference of `quantise` does, and a wide product."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.product import product
from deepseek_mp.ops.reference.quantise import quantise

_ROWS = Cast("fp8_e4m3", "row", power_of_two=False, rows=True, columns=False)


@torch.no_grad()
def fp8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.fp8_linear.fp8_linear`."""
    values, row_scale, _, _ = quantise(x, _ROWS)
    return product(values, row_scale, q, scale, ("row", "row"), bias, x.dtype)[: len(x)]
