"""The kernel for the sums over every row that rounding errors are made of: one pass over the values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["K"])
def row_sums_kernel(
    x, rounded, out, K, row_stride, column_stride, way_stride, FIELDS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of row `program_id(0)` of x [M, K], against the way `program_id(1)` of rounded [W, M, K], which lie in
    memory as x does, into out [W, M, FIELDS], in the order of `ops.statistics.ROW_FIELDS`.
    """
    row, way = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    zeros = tl.zeros([BLOCK], dtype=tl.float32)
    error_energy, energy, ratios, ratio_squares, sides = zeros, zeros, zeros, zeros, zeros
    nonzeros, underflows, overflows, finites, sizes, rounded_sizes = zeros, zeros, zeros, zeros, zeros, zeros
    for block in range(BLOCKS):
        k = block * BLOCK + tl.arange(0, BLOCK)
        inside = k < K
        place = row * row_stride + k.to(tl.int64) * column_stride
        own = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        made = tl.load(rounded + way * way_stride + place, mask=inside, other=0.0).to(tl.float32)
        finite = inside & (tl.abs(own) < float("inf"))
        kept = finite & (tl.abs(made) < float("inf"))
        value = tl.where(kept, own, 0.0)
        error = tl.where(kept, made - own, 0.0)
        nonzero = value != 0.0
        ratio = tl.where(nonzero, error / tl.where(nonzero, value, 1.0), 0.0)
        ratio = tl.minimum(tl.maximum(ratio, -1.0), 1.0)
        error_energy += error * error
        energy += value * value
        ratios += ratio
        ratio_squares += ratio * ratio
        sides += tl.where(value < 0.0, -ratio, ratio)
        nonzeros += nonzero.to(tl.float32)
        underflows += (nonzero & (made == 0.0)).to(tl.float32)
        overflows += (finite & (kept == 0)).to(tl.float32)
        finites += finite.to(tl.float32)
        sizes += tl.abs(value)
        rounded_sizes += tl.abs(error + value)
    place = out + (way * tl.num_programs(0) + row) * FIELDS
    tl.store(place, tl.sum(error_energy))
    tl.store(place + 1, tl.sum(energy))
    tl.store(place + 2, tl.sum(ratios))
    tl.store(place + 3, tl.sum(ratio_squares))
    tl.store(place + 4, tl.sum(sides))
    tl.store(place + 5, tl.sum(nonzeros))
    tl.store(place + 6, tl.sum(underflows))
    tl.store(place + 7, tl.sum(overflows))
    tl.store(place + 8, tl.sum(finites))
    tl.store(place + 9, tl.sum(sizes))
    tl.store(place + 10, tl.sum(rounded_sizes))
