"""`quantise` as Triton kernels: one pass where the scale's group lies in a tile, two where it does not.

1x128 and 128x128 groups lie in one tile of 128 x 128: each value is read once. A scale of a whole
tensor or row needs the maximum first, so the matrix is read twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.layouts import padded_rows, scale_shape
from deepseek_mp.ops.triton.amax_kernel import matrix_amax_kernel, tensor_amax_kernel
from deepseek_mp.ops.triton.cast_kernel import TILE, cast_kernel
from deepseek_mp.precision import find_format

_TRITON_FORMATS = {
    "fp8_e4m3": "fp8e4nv",
    "fp8_e5m2": "fp8e5",
    "fp8_e4m3fnuz": "fp8e4b8",
    "fp8_e5m2fnuz": "fp8e5b16",
}
_AMAX_BLOCK = 16384
WARPS = {"tensor": 4, "row": 4, "1x128": 4, "128x128": 8}
"""Warps per tile, by measurement on an H200: fewer keep more of a tile in each thread, more hide more latency."""


def quantise(
    x: Tensor, format: str, granularity: str, power_of_two: bool, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.schema.quantise`."""
    count, width = x.shape
    padded = padded_rows(count, granularity)
    target, dtype = find_format(format), torch_dtype(format)
    tiles = -(-width // TILE), -(-padded // TILE)
    scales = x.new_empty(0, dtype=torch.float32)
    q = x.new_empty((padded, width), dtype=dtype) if rows else x.new_empty(0, dtype=dtype)
    qt = x.new_empty((width, padded), dtype=dtype) if columns else x.new_empty(0, dtype=dtype)
    s = x.new_empty(scale_shape(granularity, padded, width), dtype=torch.float32) if rows else scales
    st = x.new_empty(scale_shape(granularity, width, padded), dtype=torch.float32) if columns else scales
    top, column_top = _amax(x, granularity, rows, columns, padded)
    if padded:
        cast_kernel[tiles](
            x, top, column_top, q.view(torch.uint8), s, qt.view(torch.int32), st, count, width, padded,
            FORMAT=_TRITON_FORMATS[target.name], LARGEST=target.max, GRANULARITY=granularity,
            POWER_OF_TWO=power_of_two, ROWS=rows, COLUMNS=columns,
            PTX=torch.version.hip is None, num_warps=WARPS[granularity],
        )  # fmt: skip
    return q, s, qt, st


def _amax(x: Tensor, granularity: str, rows: bool, columns: bool, padded: int) -> tuple[Tensor, Tensor]:
    """The maxima that a second pass needs: of the tensor, or of all rows and columns."""
    if granularity == "tensor":
        amax = x.new_zeros((), dtype=torch.float32)
        if x.numel():
            tensor_amax_kernel[(-(-x.numel() // _AMAX_BLOCK),)](x, amax, x.numel(), BLOCK=_AMAX_BLOCK, num_warps=8)
        return amax, amax
    if granularity != "row":
        return x, x
    count, width = x.shape
    both = x.new_zeros(padded + width, dtype=torch.float32)
    if count:
        matrix_amax_kernel[(-(-width // TILE), -(-count // TILE))](
            x, both, both[padded:], count, width, ROWS=rows, COLUMNS=columns, BLOCK_M=TILE, BLOCK_K=TILE, num_warps=8
        )
    return both, both[padded:]
