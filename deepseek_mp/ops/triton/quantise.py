"""`quantise` and `quantise_delayed` as Triton kernels: one pass where the scale's group lies in a tile.

1x32, 1x128 and 128x128 groups lie in one tile of 128 x 128: each value is read once. A scale of a whole
tensor or row needs the maximum first, so the matrix is read twice. A delayed scale is known before: where it
is not, the same two kernels find the maximum after all, so that the host need not know which case it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_mp.ops.layouts import padded_rows
from deepseek_mp.ops.operands import Cast, Operands, empty_operands
from deepseek_mp.ops.triton.amax_kernel import matrix_amax_kernel, tensor_amax_kernel, unknown_amax_kernel
from deepseek_mp.ops.triton.cast_kernel import TILE, cast_kernel
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.pair_kernel import cast_pairs_kernel
from deepseek_mp.precision import find_format

_TRITON_FORMATS = {
    "fp8_e4m3": "fp8e4nv",
    "fp8_e5m2": "fp8e5",
    "fp8_e4m3fnuz": "fp8e4b8",
    "fp8_e5m2fnuz": "fp8e5b16",
}
_PTX_FORMATS = ("fp8_e4m3", "fp8_e5m2")
AMAX_BLOCK = 16384
WARPS = {"tensor": 4, "row": 4, "1x32": 8, "1x128": 8, "128x128": 8, "delayed": 8}
"""Warps per tile, by measurement on an H200: fewer keep more of a tile in each thread, more hide more latency.
Two are not measured: "delayed" has the reduction that 128x128 has, and with 1x32 four warps take twice the registers
of a thread that eight take (248 and 121, compiled for sm_90)."""
PAIR_WARPS = 4
"""By measurement on an H200: with eight, `cast_pairs_kernel` is a quarter slower."""
STOCHASTIC_WARPS = 8
"""As many random numbers as values are held: compiled for sm_90, four warps run out of registers and eight do not.
The time is not measured."""


def quantise(x: Tensor, cast: Cast, seed: Tensor | None = None) -> Operands:
    """See `ops.schema.quantise`."""
    if seed is None and _in_pairs(x, cast):
        return _cast_pairs(x, cast)
    top, column_top = _amax(x, cast)
    return _cast(x, (top, column_top, top, top), cast, cast.granularity, seed)


def quantise_delayed(x: Tensor, top: Tensor, amax: Tensor, cast: Cast) -> Operands:
    """See `ops.schema.quantise_delayed`."""
    own = x.new_zeros((), dtype=torch.float32)
    if x.numel():
        grid = (-(-x.numel() // AMAX_BLOCK),)
        with on_device(x.device):
            unknown_amax_kernel[grid](x, own, top, x.numel(), BLOCK=AMAX_BLOCK, num_warps=8)
    return _cast(x, (own, own, top, amax), cast, "delayed")


def _cast(
    x: Tensor,
    maxima: tuple[Tensor, Tensor, Tensor, Tensor],
    cast: Cast,
    kind: str,
    seed: Tensor | None = None,
) -> Operands:
    """The cast with maxima that are there: of rows or the whole, of columns, the one to hold, the one to raise."""
    made = empty_operands(x, cast)
    across, down, padded = tiles_of(x, cast)
    if down:
        with on_device(x.device):
            cast_kernel[(across, down)](
                x, x if seed is None else seed, *maxima, *bytes_and_words(made), *x.shape, padded,
                **cast_constants(cast, kind) | _rounding_constants(cast, stochastic=seed is not None),
            )  # fmt: skip
    return made


def _in_pairs(x: Tensor, cast: Cast) -> bool:
    """Whether `cast_pairs_kernel` casts x. It reads words of 32 bits, and a view may begin within one."""
    bf16 = x.dtype == torch.bfloat16 and x.storage_offset() % 2 == 0
    return bf16 and cast.granularity == "1x128" and torch.version.hip is None and cast.format in _PTX_FORMATS


def _cast_pairs(x: Tensor, cast: Cast) -> Operands:
    made = empty_operands(x, cast)
    across, down, padded = tiles_of(x, cast)
    q, s, qt, st = made
    target = find_format(cast.format)
    if across * down and (cast.rows or cast.columns):
        with on_device(x.device):
            cast_pairs_kernel[((cast.rows + cast.columns) * across, down)](
                x.view(torch.int32), q.view(torch.int16), s, qt.view(torch.int32), st, *x.shape, padded,
                FORMAT=_TRITON_FORMATS[target.name], LARGEST=target.max, POWER_OF_TWO=cast.power_of_two,
                ROWS=cast.rows, COLUMNS=cast.columns, num_warps=PAIR_WARPS,
            )  # fmt: skip
    return made


def tiles_of(x: Tensor, cast: Cast) -> tuple[int, int, int]:
    """Tiles across and down the operands of x [M, K], and their rows."""
    padded = padded_rows(x.shape[0], cast.granularity)
    return -(-x.shape[1] // TILE), -(-padded // TILE), padded


def bytes_and_words(made: Operands) -> Operands:
    """Operands as the kernels write them: values in bytes, transposed ones in words of four."""
    q, s, qt, st = made
    return q.view(torch.uint8), s, qt.view(torch.int32), st


def cast_constants(cast: Cast, kind: str) -> dict[str, Any]:
    """What a kernel that casts is compiled for; `kind` is the granularity or "delayed"."""
    target = find_format(cast.format)
    return {
        "FORMAT": _TRITON_FORMATS[target.name], "LARGEST": target.max, "GRANULARITY": kind,
        "POWER_OF_TWO": cast.power_of_two, "ROWS": cast.rows, "COLUMNS": cast.columns,
        "PTX": torch.version.hip is None, "num_warps": WARPS[kind],
    }  # fmt: skip


def _rounding_constants(cast: Cast, *, stochastic: bool) -> dict[str, Any]:
    """What the cast is compiled for beyond that, to round to the nearest or stochastically."""
    if not stochastic:
        return {"EPSILON": 0.0, "SMALLEST": 0.0}
    target = find_format(cast.format)
    return {"EPSILON": target.epsilon, "SMALLEST": target.smallest_subnormal, "num_warps": STOCHASTIC_WARPS}


def _amax(x: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """The maxima that a second pass needs: of the tensor, or of all rows and columns."""
    if cast.granularity == "tensor":
        amax = x.new_zeros((), dtype=torch.float32)
        if x.numel():
            with on_device(x.device):
                tensor_amax_kernel[(-(-x.numel() // AMAX_BLOCK),)](x, amax, x.numel(), BLOCK=AMAX_BLOCK, num_warps=8)
        return amax, amax
    if cast.granularity != "row":
        return x, x
    count, width = x.shape
    padded = padded_rows(count, cast.granularity)
    both = x.new_zeros(padded + width, dtype=torch.float32)
    if count:
        with on_device(x.device):
            matrix_amax_kernel[(-(-width // TILE), -(-count // TILE))](
                x, both, both[padded:], count, width,
                ROWS=cast.rows, COLUMNS=cast.columns, BLOCK_M=TILE, BLOCK_K=TILE, num_warps=8,
            )  # fmt: skip
    return both, both[padded:]
