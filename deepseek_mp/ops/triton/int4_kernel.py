"""The kernels of a linear layer with a weight in 4 bits: one for a single row of x, one for several.

A byte holds two weights of a group of 2 * HALF that are HALF apart (`ops.int4_linear`), so that the low and the high
nibbles of a block of bytes meet blocks of x that lie along its row. Bytes are read 16 a thread; what is made of them is
then taken as [channels, groups, HALF], which moves nothing, so that scale and zero of a group are widened over its
bytes without being loaded for each. With code 8 for zero, a weight is code * scale + offset, offset = zero - 8 * scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.early_kernel import wait_for_those_before


@triton.jit
def _scale_and_offset(scale, zero, n, group, there, LINE):
    """fp32 [BLOCK_N, GROUPS]; zeros where there is no weight. LINE is from one group's values to the next one's."""
    place = group.to(tl.int64)[None, :] * LINE + n[:, None]
    steps = tl.load(scale + place, mask=there, other=0.0).to(tl.float32)
    return steps, tl.load(zero + place, mask=there, other=0.0).to(tl.float32) - 8.0 * steps


@triton.jit
def int4_vector_kernel(
    x, q, scale, zero, bias, out, N, BYTES, LINE, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [N] = weight [N, K] @ x [K] (+ bias [N]): BLOCK_N channels a program, STEPS blocks of GROUPS groups each.

    BYTES, not K, is what it is told: rows start at whole 16 bytes, as the compiler can then see.

    What the offsets add is the sum of a group's x times the offset, so that a byte costs two products and a sum.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.arange(0, GROUPS)
    flat = tl.arange(0, GROUPS * HALF)
    there = n < N
    weights_at = q + n.to(tl.int64)[:, None] * BYTES + flat[None, :]
    values_at = x + flat // HALF * (2 * HALF) + flat % HALF
    total = tl.zeros([BLOCK_N, GROUPS, HALF], dtype=tl.float32)
    offsets = tl.zeros([BLOCK_N, GROUPS], dtype=tl.float32)
    wait_for_those_before(EARLY)
    for step in range(STEPS):
        first = step * GROUPS
        inside = flat < BYTES - first * HALF
        weights = tl.load(
            weights_at + first * HALF, mask=there[:, None] & inside[None, :], other=0, eviction_policy="evict_first"
        )
        low = tl.load(values_at + first * (2 * HALF), mask=inside, other=0.0).to(tl.float32)
        high = tl.load(values_at + first * (2 * HALF) + HALF, mask=inside, other=0.0).to(tl.float32)
        known = group < BYTES // HALF - first
        steps, offset = _scale_and_offset(scale, zero, n, first + group, there[:, None] & known[None, :], LINE)
        codes = (weights & 15).to(tl.float32) * low[None, :] + (weights >> 4).to(tl.float32) * high[None, :]
        total += tl.reshape(codes, (BLOCK_N, GROUPS, HALF)) * steps[:, :, None]
        offsets += offset * tl.sum(tl.reshape(low + high, (GROUPS, HALF)), axis=1)[None, :]
    sums = tl.sum(tl.sum(total, axis=2) + offsets, axis=1)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + n, sums.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M"])
def int4_matrix_kernel(
    x, q, scale, zero, bias, out, M, N, BYTES, LINE, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, STEPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ weight [N, K].T (+ bias [N]): a tile a program, those of the same channels next.

    The weight is widened to the dtype of x, as the left operand, which matrix units take from registers.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.arange(0, GROUPS)
    flat = tl.arange(0, GROUPS * HALF)
    there = n < N
    weights_at = q + n.to(tl.int64)[:, None] * BYTES + flat[None, :]
    values_at = x + m.to(tl.int64)[None, :] * (2 * BYTES) + (flat // HALF * (2 * HALF) + flat % HALF)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    wait_for_those_before(EARLY)
    for step in range(STEPS):
        first = step * GROUPS
        inside = flat < BYTES - first * HALF
        rows = inside[:, None] & (m < M)[None, :]
        weights = tl.load(weights_at + first * HALF, mask=there[:, None] & inside[None, :], other=0)
        low = tl.load(values_at + first * (2 * HALF), mask=rows, other=0.0)
        high = tl.load(values_at + first * (2 * HALF) + HALF, mask=rows, other=0.0)
        known = group < BYTES // HALF - first
        steps, offset = _scale_and_offset(scale, zero, n, first + group, there[:, None] & known[None, :], LINE)
        codes = tl.reshape(weights, (BLOCK_N, GROUPS, HALF))
        left = (codes & 15).to(tl.float32) * steps[:, :, None] + offset[:, :, None]
        total = tl.dot(tl.reshape(left.to(low.dtype), (BLOCK_N, GROUPS * HALF)), low, total)
        left = (codes >> 4).to(tl.float32) * steps[:, :, None] + offset[:, :, None]
        total = tl.dot(tl.reshape(left.to(low.dtype), (BLOCK_N, GROUPS * HALF)), high, total)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=there[:, None] & (m < M)[None, :])
