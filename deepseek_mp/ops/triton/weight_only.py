"""`weight_only_linear` by Triton: one launch, and every byte of the weight read once for up to 128 rows of x.

Sizes are the fastest of searches on an H200, for one row in a served decoder of 7B weights, for several summed over its
layers: eight rows take 0.85 of BF16's time in int8; from about 64 rows, and from eight in fp8, BF16 is faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deepseek_mp.backends.early_launch import can_launch_early
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.early_launch import early, is_unwritten
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.paired_kernel import VALUES, paired_vector_kernel
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
"""Steps that a program has as code of their own, so that loads of several are under way."""
PAIRED, PAIRED_AT_ONCE = Lines(channels=16, width=1024, warps=4), 12
"""Those of the kernel that multiplies pairs."""


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
    if q.dtype not in LINES:  # the bytes of another kind of FP8 mean other values
        passed = f"weights in {q.dtype} for the Triton kernel of weights in 8 bits"
        raise ConfigError(explain(passed, ", ".join(map(str, LINES)), "Use 'reference'"))
    x, scale = x.contiguous(), scale.contiguous()
    (rows, width), channels = x.shape, len(q)
    out = x.new_empty((rows, channels))
    if not out.numel():
        return out
    given = (x, q, scale, scale if bias is None else bias.contiguous(), out)
    with on_device(x.device):
        if rows == 1 and _is_paired(x, q):
            _paired(*given, has_bias=bias is not None)
        elif rows == 1:
            lines = LINES[q.dtype]
            turns, steps = _turns(width, lines, AT_ONCE)
            vector_kernel[(triton.cdiv(channels, lines.channels),)](
                *given, channels, width, HAS_BIAS=bias is not None, BLOCK_N=lines.channels, BLOCK_K=lines.width,
                TURNS=turns, STEPS=steps, num_warps=lines.warps, **early(),
            )  # fmt: skip
        else:
            tiling = next((tiling for tiling in TILINGS if rows <= tiling.m), TILINGS[-1])
            matrix_kernel[(triton.cdiv(rows, tiling.m) * triton.cdiv(channels, tiling.n),)](
                *given, rows, channels, width, HAS_BIAS=bias is not None,
                BLOCK_M=tiling.m, BLOCK_N=tiling.n, BLOCK_K=tiling.k, STEPS=triton.cdiv(width, tiling.k),
                num_warps=tiling.warps, num_stages=tiling.stages, **early(),
            )  # fmt: skip
    return out


def _is_paired(x: Tensor, q: Tensor) -> bool:
    """Whether the kernel that multiplies pairs takes these: BF16, whole words, and a device with its instructions."""
    whole = x.shape[1] % VALUES.value == 0 and _is_whole(x) and _is_whole(q)
    return whole and x.dtype is torch.bfloat16 and can_launch_early(x.device)


def _is_whole(tensor: Tensor) -> bool:
    """Whether it begins with a word, in memory and in what PyTorch keeps of it."""
    begins = tensor.data_ptr(), tensor.storage_offset() * tensor.itemsize
    return all(at % torch.int64.itemsize == 0 for at in begins)


def _paired(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor, out: Tensor, *, has_bias: bool) -> None:
    (channels, width), lines = q.shape, PAIRED
    turns, steps = _turns(width, lines, PAIRED_AT_ONCE)
    paired_vector_kernel[(triton.cdiv(channels, lines.channels),)](
        # Flat, since the stride of a dimension of size 1 may be any, also one that is not in whole words.
        x[0].view(torch.int64), q.flatten().view(torch.int64), scale, bias, out, channels, width // VALUES.value,
        HAS_BIAS=has_bias, IS_INT8=q.dtype is torch.int8, BLOCK_N=lines.channels,
        BLOCK_W=lines.width // VALUES.value, TURNS=turns, STEPS=steps, AHEAD=is_unwritten(q),
        num_warps=lines.warps, **early(),
    )  # fmt: skip


def _turns(width: int, lines: Lines, at_once: int) -> tuple[int, int]:
    """Turns of a program, and steps in each, at most so many."""
    steps = -(-width // lines.width)
    turns = max(1, -(-steps // at_once))
    return turns, -(-steps // turns)
