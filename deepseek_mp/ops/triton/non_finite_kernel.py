"""The kernel that counts values that are infinite or NaN, by their bits: one pass over memory.

Programs other than the last read whole tiles without a mask: a mask that may end anywhere makes the compiler read
values one by one instead of sixteen bytes at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def non_finite_kernel(
    bits, found, count, MASK: tl.constexpr, PATTERN: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds to found [], int64, how many of bits [count], integers, are PATTERN where MASK has ones; zero is none.

    A program has TILES of BLOCK values, and writes only where it found some. Integers add up to the same in any order.
    """
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
    inside = tl.arange(0, BLOCK)
    own = tl.zeros([BLOCK], dtype=tl.int32)
    if first + TILES * BLOCK <= count:
        for tile in tl.static_range(TILES):
            value = tl.load(bits + first + tile * BLOCK + inside)
            own += ((value & MASK) == PATTERN).to(tl.int32)
    else:
        for tile in tl.static_range(TILES):
            place = first + tile * BLOCK + inside
            value = tl.load(bits + place, mask=place < count, other=0)
            own += ((value & MASK) == PATTERN).to(tl.int32)
    total = tl.sum(own)
    tl.atomic_add(found, total.to(tl.int64), mask=total > 0, sem="relaxed")
