"""`quantise` and `quantise_delayed` as Triton kernels: one pass where the scale's group lies in a tile.

1x128 and 128x128 groups lie in one tile of 128 x 128: each value is read once. A scale of a whole
tensor or row needs the maximum first, so the matrix is read twice. A delayed scale is known before: where it
is not, the same two kernels find the maximum after all, so that the host need not know which case it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.layouts import padded_rows, scale_shape
from deepseek_mp.ops.triton.amax_kernel import matrix_amax_kernel, tensor_amax_kernel, unknown_amax_kernel
from deepseek_mp.ops.triton.cast_kernel import TILE, cast_kernel
from deepseek_mp.precision import find_format

_TRITON_FORMATS = {
    "fp8_e4m3": "fp8e4nv",
    "fp8_e5m2": "fp8e5",
    "fp8_e4m3fnuz": "fp8e4b8",
    "fp8_e5m2fnuz": "fp8e5b16",
}
_AMAX_BLOCK = 16384
WARPS = {"tensor": 4, "row": 4, "1x128": 4, "128x128": 8, "delayed": 8}
"""Warps per tile, by measurement on an H200: fewer keep more of a tile in each thread, more hide more latency.
"delayed" is not measured: it has the reduction that 128x128 has."""


def quantise(
    x: Tensor, format: str, granularity: str, power_of_two: bool, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.schema.quantise`."""
    top, column_top = _amax(x, granularity, rows, columns, padded_rows(x.shape[0], granularity))
    return _cast(x, (top, column_top, top, top), format, granularity, power_of_two, (rows, columns))


def quantise_delayed(
    x: Tensor, top: Tensor, amax: Tensor, format: str, power_of_two: bool, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.schema.quantise_delayed`."""
    own = x.new_zeros((), dtype=torch.float32)
    if x.numel():
        grid = (-(-x.numel() // _AMAX_BLOCK),)
        unknown_amax_kernel[grid](x, own, top, x.numel(), BLOCK=_AMAX_BLOCK, num_warps=8)
    return _cast(x, (own, own, top, amax), format, "delayed", power_of_two, (rows, columns))


def _cast(
    x: Tensor,
    maxima: tuple[Tensor, Tensor, Tensor, Tensor],
    format: str,
    kind: str,
    power_of_two: bool,
    layouts: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cast with maxima that are there: of rows or the whole, of columns, the one to hold, the one to raise."""
    (rows, columns), granularity = layouts, "tensor" if kind == "delayed" else kind
    count, width = x.shape
    padded = padded_rows(count, granularity)
    target, dtype = find_format(format), torch_dtype(format)
    tiles = -(-width // TILE), -(-padded // TILE)
    scales = x.new_empty(0, dtype=torch.float32)
    q = x.new_empty((padded, width), dtype=dtype) if rows else x.new_empty(0, dtype=dtype)
    qt = x.new_empty((width, padded), dtype=dtype) if columns else x.new_empty(0, dtype=dtype)
    s = x.new_empty(scale_shape(granularity, padded, width), dtype=torch.float32) if rows else scales
    st = x.new_empty(scale_shape(granularity, width, padded), dtype=torch.float32) if columns else scales
    if padded:
        cast_kernel[tiles](
            x, *maxima, q.view(torch.uint8), s, qt.view(torch.int32), st, count, width, padded,
            FORMAT=_TRITON_FORMATS[target.name], LARGEST=target.max, GRANULARITY=kind,
            POWER_OF_TWO=power_of_two, ROWS=rows, COLUMNS=columns,
            PTX=torch.version.hip is None, num_warps=WARPS[kind],
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
