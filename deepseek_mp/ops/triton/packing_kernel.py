"""The kernels that bring saved tensors into bits and back, and FP8 groups back to numbers: one pass each."""

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
    inside = place < whole
    number = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(scale + group, mask=group * GROUP < whole, other=0.0)
    made = (number * by[:, None]).to(out.dtype.element_ty)
    tl.store(out + place, made, mask=inside)
    behind = (place >= whole) & (place < count)
    tl.store(out + place, tl.load(rest + (place - whole), mask=behind, other=0.0), mask=behind)


@triton.jit(do_not_specialize=["count"])
def pack_bits_kernel(x, packed, count, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """One bit for each of x [count], eight in a byte, the lowest first, to packed [count / 8], rounded up."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    place = byte[:, None] * 8 + bit[None, :]
    value = tl.load(x + place, mask=place < count, other=0)
    if RULE == "not_below":  # NaN is not below
        set_ = (value <= 0) == 0
    else:
        set_ = value > 0
    bits = tl.sum(set_.to(tl.int32) << bit[None, :], 1)
    tl.store(packed + byte, bits.to(tl.uint8), mask=byte * 8 < count)


@triton.jit(do_not_specialize=["count"])
def unpack_bits_kernel(packed, one, out, count, HAS_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """Bits to zeros and ones, or to zeros and the number at `one`, in out [count]."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    place = byte[:, None] * 8 + bit[None, :]
    bits = tl.load(packed + byte, mask=byte * 8 < count, other=0).to(tl.int32)
    set_ = (bits[:, None] >> bit[None, :]) & 1
    if HAS_ONE:
        value = tl.where(set_ != 0, tl.load(one).to(tl.float32), 0.0)
    else:
        value = set_.to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)
