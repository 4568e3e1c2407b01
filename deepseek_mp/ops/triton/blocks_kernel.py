"""What the kernels of optimizers' steps share: 8-bit blocks of moments opened and closed, and weights written.

A program owns some blocks of 256 values, as rows. Whatever belongs to them is read once and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.cast_kernel import larger


@triton.jit
def _share(codes, SIGNED: tl.constexpr):
    """What codes of a magnitude, in fp32, stand for in parts of the largest value; see `ops.block_states`."""
    if SIGNED:
        root = codes * (1 / 127)
    else:
        root = codes * (1 / 255)
        root = root * root
    return root * root


@triton.jit
def opened(codes, scales, place, inside, row, row_inside, SIGNED: tl.constexpr):
    """The moments of some blocks in fp32."""
    code = tl.load(codes + place, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + row, mask=row_inside, other=0.0)
    size = _share(code, SIGNED)
    if SIGNED:
        size = tl.where(code < 0, -size, size)
    return size * scale[:, None]


@triton.jit
def read(moment, scales, place, inside, row, row_inside, SIGNED: tl.constexpr, BLOCKS: tl.constexpr):
    """The moments of some blocks in fp32, which they are in memory unless BLOCKS."""
    if BLOCKS:
        found = opened(moment, scales, place, inside, row, row_inside, SIGNED)
    else:
        found = tl.load(moment + place, mask=inside, other=0.0)
    return found


@triton.jit
def keep(x, limit, moment, scales, place, inside, row, row_inside, SIGNED: tl.constexpr, BLOCKS: tl.constexpr):
    """Moments of some blocks to where `read` has them from."""
    if BLOCKS:
        close(x, limit, moment, scales, place, inside, row, row_inside, SIGNED)
    else:
        tl.store(moment + place, x, mask=inside)


@triton.jit
def close(x, limit, codes, scales, place, inside, row, row_inside, SIGNED: tl.constexpr):
    """Moments of some blocks [rows, 256], zero beyond the end, to codes and scales."""
    LARGEST: tl.constexpr = 127 if SIGNED else 255
    LEAST: tl.constexpr = 0 if SIGNED else 1
    size = tl.abs(x)
    scale = tl.reduce(size, 1, larger)
    scale = tl.where(scale < float("inf"), scale, float("nan"))
    part = tl.math.div_rn(size, tl.where(scale > 0, scale, 1.0)[:, None])
    root = tl.sqrt_rn(part)
    if not SIGNED:
        root = tl.sqrt_rn(root)
    below = tl.floor(root * LARGEST)
    low = _share(below, SIGNED)
    high = _share(below + 1.0, SIGNED)
    code = below + tl.where(part - low > limit * (high - low), 1.0, 0.0)
    present = part > 0 if SIGNED else x > 0  # of a second moment the part may be zero where it is not itself
    code = tl.where(present, tl.minimum(tl.maximum(code, LEAST), LARGEST), 0.0)
    if SIGNED:
        tl.store(codes + place, tl.where(x < 0, -code, code).to(tl.int8), mask=inside)
    else:
        tl.store(codes + place, code.to(tl.uint8), mask=inside)
    tl.store(scales + row, scale, mask=row_inside)


@triton.jit
def dither(place, step):
    """Numbers in (0, 1) of places and the step; see `ops.block_states.dither`."""
    turned = place.to(tl.uint32) * 0xC13FA9A9 + step.to(tl.uint32) * 0x9E3779B9
    return (turned >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08


@triton.jit
def _between(a, b, c, d, SHIFT: tl.constexpr):
    """Sixteen bits of four words each, [rows, 32], in the order of the words: [rows, 128]."""
    a, b, c, d = (a >> SHIFT) & 0xFFFF, (b >> SHIFT) & 0xFFFF, (c >> SHIFT) & 0xFFFF, (d >> SHIFT) & 0xFFFF
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _random_bits(row, step, seed, stream):
    """The bits that `ops.stored.random_bits` has for blocks of 256 values, int32 [rows, 256]."""
    counter = row[:, None].to(tl.int64) * 32 + tl.arange(0, 32)[None, :]
    low = counter.to(tl.uint32)
    zero = low * 0
    step = zero + step.to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, (counter >> 32).to(tl.uint32), step, zero + stream.to(tl.uint32))
    return tl.interleave(_between(a, b, c, d, 0), _between(a, b, c, d, 16)).to(tl.int32)


@triton.jit
def write(w, weight, lacking, at, inside, row, step, seed, stream, WRITE: tl.constexpr):
    """New values of a weight, as it is stored, to where `at` says that they lie.

    WRITE is 'fp32', 'bf16_kahan' with its compensation in `lacking`, or 'bf16_sr' with the random bits of seed and
    stream.
    """
    if WRITE == "bf16_sr":
        bits = w.to(tl.int32, bitcast=True) + _random_bits(row, step, seed, stream)
        cut = (bits & -65536).to(tl.float32, bitcast=True)
        w = tl.where(tl.abs(w) < float("inf"), cut, w)
    stored = w.to(weight.dtype.element_ty)
    tl.store(weight + at, stored, mask=inside)
    if WRITE == "bf16_kahan":
        tl.store(lacking + at, (w - stored.to(tl.float32)).to(tl.bfloat16), mask=inside)
