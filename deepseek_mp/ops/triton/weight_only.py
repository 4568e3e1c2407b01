"""`weight_only_linear` by Triton: one launch, and every byte of the weight read once for up to 128 rows of x.

Sizes are the fastest of a search over some 2400 on an H200, summed over the layers of a decoder of 7B weights. One row
of x takes 0.55 (fp8) to 0.59 (int8) of BF16's time there, eight rows in int8 0.85 of it; from about 64 rows, and from
eight in fp8, BF16 is faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.weight_only_kernel import matrix_kernel, vector_kernel

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Lines:
    """What a program has where x has one row: rows of the weight, values of each at a time, and warps."""

    channels: int
    width: int
    warps: int


LINES = {
    torch.int8: Lines(channels=8, width=2048, warps=4),
    torch.float8_e4m3fn: Lines(channels=8, width=1024, warps=2),
}
AT_ONCE = 4
"""Steps that a program has as code of their own, so that it stays in the cache of instructions."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of a tile: rows of x, channels, and values read at a time; and what a program is made of."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


TILINGS = (
    Tiling(m=16, n=32, k=256, warps=4, stages=4),
    Tiling(m=64, n=32, k=128, warps=8, stages=4),
    Tiling(m=128, n=128, k=64, warps=8, stages=3),
)
"""The first one that holds all rows of x is taken, or the last. Small ones are so that 4096 channels fill a GPU."""


def weight_only_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.weight_only.weight_only_linear`. `ConfigError` for an x that is not of 16 bits."""
    if x.dtype not in DTYPES:
        passed = f"x in {x.dtype} for the Triton kernel of weights in 8 bits"
        raise ConfigError(explain(passed, "bf16 or fp16", "Use 'reference'"))
    x, scale = x.contiguous(), scale.contiguous()
    (rows, width), channels = x.shape, len(q)
    out = x.new_empty((rows, channels))
    if not out.numel():
        return out
    given = (x, q, scale, scale if bias is None else bias.contiguous(), out)
    with on_device(x.device):
        if rows == 1:
            lines = LINES[q.dtype]
            steps = triton.cdiv(width, lines.width)
            turns = triton.cdiv(steps, AT_ONCE)
            vector_kernel[(triton.cdiv(channels, lines.channels),)](
                *given, channels, width, HAS_BIAS=bias is not None, BLOCK_N=lines.channels, BLOCK_K=lines.width,
                TURNS=turns, STEPS=triton.cdiv(steps, turns), num_warps=lines.warps,
            )  # fmt: skip
        else:
            tiling = next((tiling for tiling in TILINGS if rows <= tiling.m), TILINGS[-1])
            matrix_kernel[(triton.cdiv(rows, tiling.m) * triton.cdiv(channels, tiling.n),)](
                *given, rows, channels, width, HAS_BIAS=bias is not None,
                BLOCK_M=tiling.m, BLOCK_N=tiling.n, BLOCK_K=tiling.k, STEPS=triton.cdiv(width, tiling.k),
                num_warps=tiling.warps, num_stages=tiling.stages,
            )  # fmt: skip
    return out
