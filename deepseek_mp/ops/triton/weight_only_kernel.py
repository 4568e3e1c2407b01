"""The kernels of a linear layer with a weight in 8 bits: one for a single row of x, one for several.

A weight [N, K] is read along its rows, RUN bytes a thread, and widened in registers. Nothing of it is read again by
another program as long as one tile holds all rows of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.early_kernel import wait_for_those_before

RUN = tl.constexpr(16)
"""Values that a thread reads at once."""


@triton.jit
def _widened(weights):
    """In fp32. Of int8 by adding: processors convert whole numbers at a quarter of the rate, slower than they arrive.

    1.5 * 2^23 plus a small whole number has that number in its last bits.
    """
    if weights.dtype == tl.int8:
        return (weights.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return weights.to(tl.float32)


@triton.jit
def vector_kernel(
    x, q, scale, bias, out, N, K, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TURNS: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [N] = (q [N, K] @ x [K]) * scale [N] (+ bias [N]): BLOCK_N channels a program, TURNS * STEPS blocks of K.

    Each thread has a sum for each channel, and threads meet only at the end: a step waits for nothing but loads.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = n < N
    weights_at = q + n.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K // RUN], dtype=tl.float32)
    wait_for_those_before(EARLY)
    for turn in range(TURNS):
        for step in tl.static_range(STEPS):  # so that loads of several steps are under way
            start = (turn * STEPS + step) * BLOCK_K
            inside = k < K - start
            weights = tl.load(
                weights_at + start, mask=there[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first"
            )
            values = tl.load(x + start + k, mask=inside, other=0.0)
            products = _widened(weights) * values.to(tl.float32)[None, :]
            total += tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // RUN, RUN)), axis=2)
    sums = tl.sum(total, axis=1) * tl.load(scale + n, mask=there, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + n, sums.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M"])
def matrix_kernel(
    x, q, scale, bias, out, M, N, K,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out [M, N] = (x [M, K] @ q [N, K].T) * scale [N] (+ bias [N]): a tile a program, those of the same channels next.

    The weight is the left operand, which matrix units take from registers, where it has just been widened.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = n < N
    weights_at = q + n.to(tl.int64)[:, None] * K + k[None, :]
    values_at = x + m.to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    wait_for_those_before(EARLY)
    for step in range(STEPS):
        start = step * BLOCK_K
        inside = k < K - start
        weights = tl.load(weights_at + start, mask=there[:, None] & inside[None, :], other=0.0)
        values = tl.load(values_at + start, mask=inside[:, None] & (m < M)[None, :], other=0.0)
        total = tl.dot(weights.to(values.dtype), values, total)
    total *= tl.load(scale + n, mask=there, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=there[:, None] & (m < M)[None, :])
