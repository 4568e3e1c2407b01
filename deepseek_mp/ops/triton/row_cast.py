"""Rows cast to FP8 by one launch, for inference: a program has a row, and where it fits reads it once."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from deepseek_mp.ops.early_launch import early
from deepseek_mp.ops.layouts import padded_rows
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.row_cast_kernel import row_cast_kernel
from deepseek_mp.precision import find_format

LONGEST = 16384
"""Values of a row that its program keeps: 64 in each thread. What is longer is read twice. Not measured."""
SHORTEST = 128
"""The cast takes four values of a thread at once."""
_VALUES = 32
"""Of a thread, up to 8 warps."""


def row_cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K], contiguous, in E4M3 with a scale each, bit for bit those of `ops.schema.quantise` by row.

    Returns:
        values [P, K], P being M in whole 16s and the added rows zeros, and scales [P] in fp32.
    """
    count, width = x.shape
    padded = padded_rows(count, "row")
    values = x.new_empty((padded, width), dtype=torch.float8_e4m3fn)
    scale = x.new_empty(padded, dtype=torch.float32)
    if padded:
        block = min(triton.next_power_of_2(max(width, SHORTEST)), LONGEST)
        with on_device(x.device):
            row_cast_kernel[(padded,)](
                x, values.view(torch.uint8), scale, count, width, LARGEST=find_format("fp8_e4m3").max, BLOCK=block,
                STEPS=triton.cdiv(width, block), PTX=x.is_cuda and torch.version.hip is None,
                num_warps=min(8, max(1, block // (32 * _VALUES))), **early(),
            )  # fmt: skip
    return values, scale
