"""Kernels for the largest magnitude: of a whole tensor, and of every row and column of a matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.cast_kernel import finite_magnitude, larger, raise_to


@triton.jit
def tensor_amax_kernel(x, amax, count, BLOCK: tl.constexpr):
    """The largest finite magnitude of `count` values into amax [], which starts as zero."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = finite_magnitude(tl.load(x + place, mask=place < count, other=0.0).to(tl.float32))
    raise_to(amax, tl.max(size))


@triton.jit
def unknown_amax_kernel(x, amax, top, count, BLOCK: tl.constexpr):
    """`tensor_amax_kernel` where top [] is zero; elsewhere nothing is read and amax stays as it is."""
    if tl.load(top) == 0.0:
        tensor_amax_kernel(x, amax, count, BLOCK)


@triton.jit(do_not_specialize=["M"])
def matrix_amax_kernel(
    x, row_amax, column_amax, M, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of every row [M] and column [K], NaN or infinity if there is one; both start as zero."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None] & (k < K)[None, :]
    size = tl.abs(tl.load(x + m[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0).to(tl.float32))
    if ROWS:
        top = tl.reduce(size, 1, larger).to(tl.int32, bitcast=True)
        tl.atomic_max(row_amax.to(tl.pointer_type(tl.int32)) + m, top, mask=m < M, sem="relaxed")
    if COLUMNS:
        top = tl.reduce(size, 0, larger).to(tl.int32, bitcast=True)
        tl.atomic_max(column_amax.to(tl.pointer_type(tl.int32)) + k, top, mask=k < K, sem="relaxed")
