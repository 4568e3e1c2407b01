"""The kernel that casts a row to E4M3: its largest magnitude, its scale and its values in one program."""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.cast_kernel import fp8_bytes, larger, scales
from deepseek_mp.ops.triton.early_kernel import wait_for_those_before


@triton.jit
def _part(x, k, row, M, K):
    return tl.load(x + row * K + k, mask=(k < K) & (row < M), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def row_cast_kernel(
    x, q, s, M, K,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """q[row], s[row] of x [M, K]; rows from M on are zeros. See `ops.schema.quantise` for scales and NaN."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    wait_for_those_before(EARLY)
    value = _part(x, k, row, M, K)
    size = tl.abs(value)
    for step in range(1, STEPS):
        size = larger(size, tl.abs(_part(x, step * BLOCK + k, row, M, K)))
    scale, inverse = scales(tl.reduce(size, 0, larger), LARGEST, False, PTX)
    tl.store(s + row, scale)
    tl.store(q + row * K + k, fp8_bytes(value * inverse, "fp8e4nv", PTX), mask=k < K)
    for step in range(1, STEPS):
        place = step * BLOCK + k
        value = _part(x, place, row, M, K)
        tl.store(q + row * K + place, fp8_bytes(value * inverse, "fp8e4nv", PTX), mask=place < K)
