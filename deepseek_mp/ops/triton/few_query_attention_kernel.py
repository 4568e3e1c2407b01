"""The kernels of attention of few queries: one for a single row of each key head, one for several, one to combine.

A program has a part of the keys: every n-th block, so that what a mask hides at the end of a cache is work saved by
all programs alike. Positions that no row sees are not loaded. Softmax is in powers of two: scores come with log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.early_kernel import wait_for_those_before

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-3.4e38)
"""Nearly that of fp32."""


@triton.jit
def _shift(top):
    """What is subtracted before the exponential: the largest score, 0 where nothing was seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _for_powers_of_two(added):
    """What a mask adds, times log2(e). A model may hide keys by the least number, which must not become infinite."""
    found = added * LOG2_E
    return tl.where(found == float("-inf"), LEAST, found)


@triton.jit
def _divided(sums, total):
    """Sums over their weights; zeros where nothing was seen."""
    return sums / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["L"])
def one_row_kernel(
    q, k, v, mask, out, parts, marks, factor, HEADS, L,
    QB, QH, KB, KH, KL, VB, VH, VL, MB, MH, ML, OB, OH,
    MASK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One query of one head, program [head of the batch, part].

    Each place of a block has a softmax of its own, so that threads meet only at the end.
    """
    head, part, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, h = (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64)
    place, d, dv = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    wait_for_those_before(EARLY)
    query = tl.load(q + batch * QB + h * QH + d, mask=d < D, other=0.0).to(tl.float32) * factor
    first, step = part.to(tl.int64) * BLOCK_L, splits.to(tl.int64) * BLOCK_L
    k += batch * KB + h * KH + first * KL
    v += batch * VB + h * VH + first * VL
    mask += batch * MB + h * MH + first * ML
    top = tl.full([BLOCK_L], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_L], dtype=tl.float32)
    sums = tl.zeros([BLOCK_L, BLOCK_DV], dtype=tl.float32)
    for block in range(part, tl.cdiv(L, BLOCK_L), splits):
        seen = place < L - block * BLOCK_L
        if MASK == "bool":
            seen = seen & (tl.load(mask + place * ML, mask=seen, other=0) != 0)
        if MASK == "added":
            added = tl.load(mask + place * ML, mask=seen, other=float("-inf")).to(tl.float32)
            seen = added != float("-inf")
        keys = tl.load(k + place[:, None] * KL + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        values = tl.load(v + place[:, None] * VL + dv[None, :], mask=seen[:, None] & (dv < DV)[None, :], other=0.0)
        scores = tl.sum(keys.to(tl.float32) * query[None, :], axis=1)
        if MASK == "added":
            scores += _for_powers_of_two(added)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, scores)
        kept = tl.exp2(top - _shift(higher))
        weights = tl.exp2(scores - _shift(higher))
        total = total * kept + weights
        sums = sums * kept[:, None] + weights[:, None] * values.to(tl.float32)
        top = higher
        k += step * KL
        v += step * VL
        mask += step * ML
    highest = tl.max(top, axis=0)
    kept = tl.exp2(top - _shift(highest))
    whole = tl.sum(total * kept, axis=0)
    mixed = tl.sum(sums * kept[:, None], axis=0)
    if SPLIT:
        at = head.to(tl.int64) * splits + part
        tl.store(parts + at * DV + dv, mixed, mask=dv < DV)
        tl.store(marks + at * 2, highest)
        tl.store(marks + at * 2 + 1, whole)
    else:
        mixed = _divided(mixed, whole)
        tl.store(out + batch * OB + h * OH + dv, mixed.to(out.dtype.element_ty), mask=dv < DV)


@triton.jit(do_not_specialize=["L"])
def rows_kernel(
    q, k, v, mask, out, parts, marks, factor, SHARED, L,
    QB, QH, QQ, KB, KH, KL, VB, VH, VL, MB, MH, MQ, ML, OB, OH, OQ,
    MASK: tl.constexpr, ALIKE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """All queries of the heads that share a key head, BLOCK_R rows a program, [key head of the batch, part, rows].

    ALIKE: the mask is the same for all rows, and is read once.
    """
    head, part, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, shared = (head // SHARED).to(tl.int64), (head % SHARED).to(tl.int64)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = r < GROUP * QUERIES
    h, i = shared * GROUP + r // QUERIES, (r % QUERIES).to(tl.int64)
    place, d, dv = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    wait_for_those_before(EARLY)
    query = tl.load(
        q + (batch * QB + h * QH + i * QQ)[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
    )
    first, step = part.to(tl.int64) * BLOCK_L, splits.to(tl.int64) * BLOCK_L
    k += batch * KB + shared * KH + first * KL
    v += batch * VB + shared * VH + first * VL
    mask += batch * MB + first * ML
    if not ALIKE:
        mask += (h * MH + i * MQ)[:, None]
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_DV], dtype=tl.float32)
    for block in range(part, tl.cdiv(L, BLOCK_L), splits):
        used = place < L - block * BLOCK_L
        if ALIKE:
            if MASK == "bool":
                used = used & (tl.load(mask + place * ML, mask=used, other=0) != 0)
            if MASK == "added":
                given = tl.load(mask + place * ML, mask=used, other=float("-inf")).to(tl.float32)
                used = given != float("-inf")
                added = given[None, :]
            seen = there[:, None] & used[None, :]
        else:
            seen = there[:, None] & used[None, :]
            if MASK == "bool":
                seen = seen & (tl.load(mask + place[None, :] * ML, mask=seen, other=0) != 0)
            if MASK == "added":
                added = tl.load(mask + place[None, :] * ML, mask=seen, other=float("-inf")).to(tl.float32)
                seen = added != float("-inf")
            used = tl.max(seen.to(tl.int32), axis=0) > 0
        keys = tl.load(k + place[None, :] * KL + d[:, None], mask=used[None, :] & (d < D)[:, None], other=0.0)
        values = tl.load(v + place[:, None] * VL + dv[None, :], mask=used[:, None] & (dv < DV)[None, :], other=0.0)
        scores = tl.dot(query, keys) * factor
        if MASK == "added":
            scores += _for_powers_of_two(added)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        kept = tl.exp2(top - _shift(higher))
        weights = tl.exp2(scores - _shift(higher)[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None])
        top = higher
        k += step * KL
        v += step * VL
        mask += step * ML
    if SPLIT:
        at = ((batch * SHARED * GROUP + h) * QUERIES + i) * splits + part
        tl.store(parts + at[:, None] * DV + dv[None, :], sums, mask=there[:, None] & (dv < DV)[None, :])
        tl.store(marks + at * 2, top, mask=there)
        tl.store(marks + at * 2 + 1, total, mask=there)
    else:
        sums = _divided(sums, total[:, None])
        at = out + (batch * OB + h * OH + i * OQ)[:, None] + dv[None, :]
        tl.store(at, sums.to(out.dtype.element_ty), mask=there[:, None] & (dv < DV)[None, :])


@triton.jit
def combine_kernel(
    parts, marks, out, HEADS, QUERIES, OB, OH, OQ,
    DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The parts of a row put together, program [row of all heads, block of its values]."""
    row = tl.program_id(0).to(tl.int64)
    batch, h, i = row // (HEADS * QUERIES), row // QUERIES % HEADS, row % QUERIES
    s, dv = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    at = row * SPLITS + s
    wait_for_those_before(EARLY)
    top = tl.load(marks + at * 2, mask=s < SPLITS, other=float("-inf"))
    total = tl.load(marks + at * 2 + 1, mask=s < SPLITS, other=0.0)
    sums = tl.load(parts + at[:, None] * DV + dv[None, :], mask=(s < SPLITS)[:, None] & (dv < DV)[None, :], other=0.0)
    kept = tl.exp2(top - _shift(tl.max(top, axis=0)))
    mixed = _divided(tl.sum(sums * kept[:, None], axis=0), tl.sum(total * kept, axis=0))
    tl.store(out + batch * OB + h * OH + i * OQ + dv, mixed.to(out.dtype.element_ty), mask=dv < DV)
