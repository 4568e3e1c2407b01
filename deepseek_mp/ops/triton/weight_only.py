"""`weight_only_linear` by Triton: one launch, and every byte of the weight read once for up to 128 rows of x.

Times have not been measured yet: sizes are chosen by how many bytes are under way. A processor of an H200 has to have
some 25 KB of loads under way to keep its memory busy. One row of x, 4096 channels: 512 programs, each with 8 KB of the
weight at a time, are four on each of 132 processors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.triton.packing import on_device
from deepseek_mp.ops.triton.weight_only_kernel import matrix_kernel, vector_kernel

DTYPES = (torch.bfloat16, torch.float16)
_CHANNELS = 8
"""Rows of the weight that a program has where x has one row."""
_WIDTH = 1024
"""Values of each that it reads at a time."""
_WARPS = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of a tile: rows of x, channels, and values read at a time; and what a program is made of."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


TILINGS = (
    Tiling(m=16, n=16, k=256, warps=2, stages=5),
    Tiling(m=64, n=32, k=128, warps=4, stages=4),
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
            vector_kernel[(triton.cdiv(channels, _CHANNELS),)](
                *given, channels, width, HAS_BIAS=bias is not None,
                BLOCK_N=_CHANNELS, BLOCK_K=_WIDTH, STEPS=triton.cdiv(width, _WIDTH), num_warps=_WARPS,
            )  # fmt: skip
        else:
            tiling = next((tiling for tiling in TILINGS if rows <= tiling.m), TILINGS[-1])
            matrix_kernel[(triton.cdiv(rows, tiling.m) * triton.cdiv(channels, tiling.n),)](
                *given, rows, channels, width, HAS_BIAS=bias is not None,
                BLOCK_M=tiling.m, BLOCK_N=tiling.n, BLOCK_K=tiling.k, STEPS=triton.cdiv(width, tiling.k),
                num_warps=tiling.warps, num_stages=tiling.stages,
            )  # fmt: skip
    return out
