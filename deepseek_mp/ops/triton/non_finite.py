"""How many values of a tensor are infinite or NaN, by Triton: one launch, and nothing as large beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.non_finite import BITS
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.non_finite_kernel import non_finite_kernel

BLOCK = 4096
TILES = 4
"""Of a program, 16 values of each tile in each thread: few programs add up what their threads found. Not measured."""
WARPS = 8


def non_finite(x: Tensor) -> Tensor:
    """See `ops.non_finite.non_finite`; x is of a type in `BITS`, without gaps (`ops.non_finite.is_gapless`)."""
    dtype, mask, pattern = BITS[x.dtype]
    found = torch.zeros((), dtype=torch.int64, device=x.device)
    count = x.numel()
    if count:
        with on_device(x.device):
            non_finite_kernel[(-(-count // (BLOCK * TILES)),)](
                x.view(dtype), found, count,
                MASK=mask, PATTERN=pattern, TILES=TILES, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return found.float()
