"""`int4_linear` by Triton: one launch, and every byte of the weight read once for up to 128 rows of x.

`benchmarks/weight_only.py` times it. Sizes were not searched: they have about as many bytes under way as those of
`ops.triton.weight_only`, so that blocks have up to twice as many weights.
"""

from __future__ import annotations

import triton
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.early_launch import early
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.int4_kernel import int4_matrix_kernel, int4_vector_kernel
from deepseek_mp.ops.triton.weight_only import DTYPES, Tiling

_CHANNELS = 8
"""Rows of the weight that a program has where x has one row."""
_BYTES = 1024
"""Of each that it reads at a time."""
_WARPS = 4
TILINGS = (
    Tiling(m=16, n=16, k=512, warps=2, stages=4),
    Tiling(m=64, n=32, k=256, warps=4, stages=3),
    Tiling(m=128, n=128, k=128, warps=8, stages=3),
)
"""The first one that holds all rows of x is taken, or the last; k in weights."""


def int4_linear(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `ops.int4_linear.int4_linear`. `ConfigError` for an x that is not of 16 bits."""
    if x.dtype not in DTYPES:
        passed = f"x in {x.dtype} for the Triton kernel of weights in 4 bits"
        raise ConfigError(explain(passed, "bf16 or fp16", "Use 'reference'"))
    x = x.contiguous()
    (rows, width), (groups, channels) = x.shape, scale.shape
    out = x.new_empty((rows, channels))
    if not out.numel():
        return out
    half = width // groups // 2
    given = (x, q, scale, zero, scale if bias is None else bias.contiguous(), out)
    with on_device(x.device):
        if rows == 1:
            count = _BYTES // half
            int4_vector_kernel[(triton.cdiv(channels, _CHANNELS),)](
                *given, channels, width // 2, scale.stride(0), HAS_BIAS=bias is not None,
                BLOCK_N=_CHANNELS, GROUPS=count, HALF=half, STEPS=triton.cdiv(groups, count),
                num_warps=_WARPS, **early(),
            )  # fmt: skip
        else:
            tiling = next((tiling for tiling in TILINGS if rows <= tiling.m), TILINGS[-1])
            count = tiling.k // (2 * half)
            int4_matrix_kernel[(triton.cdiv(rows, tiling.m) * triton.cdiv(channels, tiling.n),)](
                *given, rows, channels, width // 2, scale.stride(0), HAS_BIAS=bias is not None,
                BLOCK_M=tiling.m, BLOCK_N=tiling.n, GROUPS=count, HALF=half, STEPS=triton.cdiv(groups, count),
                num_warps=tiling.warps, num_stages=tiling.stages, **early(),
            )  # fmt: skip
    return out
