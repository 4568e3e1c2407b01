"""The kernels that bring saved tensors into bits and back, and FP8 groups back to numbers: one pass each.

All programs but the last have whole tiles, and read and write them without a mask: a mask that may end anywhere makes
the compiler move values one by one instead of sixteen bytes at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["whole", "count"])
def unpack_groups_kernel(values, scale, rest, out, whole, count, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """FP8 values [whole] times the scale of their group, and `rest` behind them, to out [count].

    A program has BLOCK groups. The product is made in fp32 and rounded once.
    """
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    kind = out.dtype.element_ty
    if (tl.program_id(0).to(tl.int64) + 1) * (BLOCK * GROUP) <= whole:
        number = tl.load(values + place).to(tl.float32)
        tl.store(out + place, (number * tl.load(scale + group)[:, None]).to(kind))
    else:
        inside = place < whole
        number = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        by = tl.load(scale + group, mask=group * GROUP < whole, other=0.0)
        tl.store(out + place, (number * by[:, None]).to(kind), mask=inside)
        behind = (place >= whole) & (place < count)
        tl.store(out + place, tl.load(rest + (place - whole), mask=behind, other=0.0), mask=behind)


@triton.jit
def _bits(value, bit, RULE: tl.constexpr):
    """Values [n, 8] as bytes [n]."""
    if RULE == "not_below":  # NaN is not below
        one = (value <= 0) == 0
    else:
        one = value > 0
    return tl.sum(one.to(tl.int32) << bit[None, :], 1).to(tl.uint8)


@triton.jit(do_not_specialize=["count"])
def pack_bits_kernel(x, packed, count, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """One bit for each of x [count], eight in a byte, the lowest first, to packed [count / 8], rounded up."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    place = byte[:, None] * 8 + bit[None, :]
    if (tl.program_id(0).to(tl.int64) + 1) * (BLOCK * 8) <= count:
        tl.store(packed + byte, _bits(tl.load(x + place), bit, RULE))
    else:
        value = tl.load(x + place, mask=place < count, other=0)
        tl.store(packed + byte, _bits(value, bit, RULE), mask=byte * 8 < count)


@triton.jit
def _numbers(bits, bit, one, kind, HAS_ONE: tl.constexpr):
    """Bytes [n] as values [n, 8]."""
    found = (bits.to(tl.int32)[:, None] >> bit[None, :]) & 1
    if HAS_ONE:
        value = tl.where(found != 0, tl.load(one).to(tl.float32), 0.0)
    else:
        value = found.to(tl.float32)
    return value.to(kind)


@triton.jit(do_not_specialize=["count"])
def unpack_bits_kernel(packed, one, out, count, HAS_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """Bits to zeros and ones, or to zeros and the number at `one`, in out [count]."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    place = byte[:, None] * 8 + bit[None, :]
    kind: tl.constexpr = out.dtype.element_ty
    if (tl.program_id(0).to(tl.int64) + 1) * (BLOCK * 8) <= count:
        tl.store(out + place, _numbers(tl.load(packed + byte), bit, one, kind, HAS_ONE))
    else:
        bits = tl.load(packed + byte, mask=byte * 8 < count, other=0)
        tl.store(out + place, _numbers(bits, bit, one, kind, HAS_ONE), mask=place < count)
