"""The kernel of a linear layer with a weight in 8 bits and one row of x in BF16 that multiplies pairs in FP16 (sm_90).

One instruction multiplies and adds two FP16 numbers. Weights in 8 bits are exact in FP16. x is when its values are
brought near to 1: eight neighbours are divided by the power of two that is just below the largest of them, so that only
what is 2^14 times smaller than that loses bits. The products of eight weights are added up in FP16, two sums of four,
and these in fp32, times the power of two. Random outputs are 3e-4 to 4e-4 of their norm off by that, where rounding
them to BF16 costs 1.6e-3.

Fewer instructions than by fp32 draw less power at the same bandwidth. They are PTX, as Triton knows no such pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.early_kernel import wait_for_those_before

VALUES = tl.constexpr(8)
"""That one thread multiplies at a time: weights in a word of 64 bits, x in two."""

_PAIR = """
shl.b32 t, x{i}, 16;
mov.b32 f, t;
and.b32 t, x{i}, 0xffff0000;
mov.b32 g, t;
mul.f32 f, f, inverse;
mul.f32 g, g, inverse;
cvt.rn.f16x2.f32 x{i}, g, f;"""
_SCALED = tl.constexpr(
    """{
.reg .b32 x<4>, a<4>, t, e;
.reg .f32 f, g, inverse;
mov.b64 {x0, x1}, $3;
mov.b64 {x2, x3}, $4;
and.b32 a0, x0, 0x7fff7fff;
and.b32 a1, x1, 0x7fff7fff;
and.b32 a2, x2, 0x7fff7fff;
and.b32 a3, x3, 0x7fff7fff;
max.u16x2 a0, a0, a1;
max.u16x2 a2, a2, a3;
max.u16x2 a0, a0, a2;
shr.b32 t, a0, 16;
and.b32 e, a0, 0xffff;
max.u32 e, e, t;
and.b32 e, e, 0x7f80;
max.u32 e, e, 0x0080;
min.u32 e, e, 0x7e80;
shl.b32 t, e, 16;
mov.b32 $2, t;
sub.u32 t, 0x7f00, e;
shl.b32 t, t, 16;
mov.b32 inverse, t;"""
    + "".join(_PAIR.format(i=i) for i in range(4))
    + """
mov.b64 $0, {x0, x1};
mov.b64 $1, {x2, x3};
}"""
)
"""Eight values in BF16, $3 and $4, as FP16, $0 and $1, times a power of two in fp32, $2.

The exponent of the largest, e, is that of the power, which is normal: from 1 for zeros and subnormals on. Its inverse
has 254 - e, which must not be below 1: so no power is above 2^126. What is not finite stays so.
"""

_HEAD = """{
.reg .b32 w0, w1, x<4>, h<4>, s;
.reg .b16 p, q, a, b, c, d;
.reg .f32 f, g;
mov.b64 {w0, w1}, $1;
mov.b64 {x0, x1}, $2;
mov.b64 {x2, x3}, $3;"""
_TAIL = """
mul.rn.f16x2 s, h0, x0;
fma.rn.f16x2 s, h1, x1, s;
fma.rn.f16x2 s, h2, x2, s;
fma.rn.f16x2 s, h3, x3, s;
mov.b32 {p, q}, s;
cvt.f32.f16 f, p;
cvt.f32.f16 g, q;
add.f32 f, f, g;
fma.rn.f32 $0, f, $4, $5;
}"""
_FP8 = tl.constexpr(
    _HEAD
    + """
mov.b32 {a, b}, w0;
mov.b32 {c, d}, w1;
cvt.rn.f16x2.e4m3x2 h0, a;
cvt.rn.f16x2.e4m3x2 h1, b;
cvt.rn.f16x2.e4m3x2 h2, c;
cvt.rn.f16x2.e4m3x2 h3, d;"""
    + _TAIL
)
"""$0 = $5 + $4 * the products of eight weights, $1, and eight values, $2 and $3."""
_INT8 = tl.constexpr(
    _HEAD
    + """
xor.b32 w0, w0, 0x80808080;
xor.b32 w1, w1, 0x80808080;
mov.b32 s, 0x64646464;
prmt.b32 h0, w0, s, 0x4140;
prmt.b32 h1, w0, s, 0x4342;
prmt.b32 h2, w1, s, 0x4140;
prmt.b32 h3, w1, s, 0x4342;
mov.b32 s, 0xe480e480;
add.rn.f16x2 h0, h0, s;
add.rn.f16x2 h1, h1, s;
add.rn.f16x2 h2, h2, s;
add.rn.f16x2 h3, h3, s;"""
    + _TAIL
)
"""The same. A byte behind 0x64 is 1024 and the byte in FP16; 128 was added to it, and 1152 is taken away."""


@triton.jit
def _words(at, there, inside):
    return tl.load(at, mask=there[:, None] & inside[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def paired_vector_kernel(
    x, q, scale, bias, out, N, WORDS, HAS_BIAS: tl.constexpr, IS_INT8: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, TURNS: tl.constexpr, STEPS: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out [N] = (q [N, K] @ x [K]) * scale [N] (+ bias [N]), K in words of eight: BLOCK_N channels a program.

    x and q are int64. A program has TURNS * STEPS blocks of BLOCK_W words. AHEAD: the first weights are asked for
    before what is in front of the kernel has ended, which must not write to them.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_W)
    there = n < N
    weights_at = q + n.to(tl.int64)[:, None] * WORDS + word[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_W], dtype=tl.float32)
    if not AHEAD:
        wait_for_those_before(EARLY)
    weights = _words(weights_at, there, word < WORDS)
    if AHEAD:
        wait_for_those_before(EARLY)
    for turn in range(TURNS):
        for step in tl.static_range(STEPS):  # so that loads of several steps are under way
            start = (turn * STEPS + step) * BLOCK_W
            inside = word < WORDS - start
            if turn > 0 or step > 0:
                weights = _words(weights_at + start, there, inside)
            first = tl.load(x + (start + word) * 2, mask=inside, other=0)
            second = tl.load(x + (start + word) * 2 + 1, mask=inside, other=0)
            first, second, factor = tl.inline_asm_elementwise(
                _SCALED, "=l,=l,=r,l,l", [first, second],
                dtype=(tl.int64, tl.int64, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip
            total = tl.inline_asm_elementwise(
                _INT8 if IS_INT8 else _FP8, "=r,l,l,l,r,r",
                [weights, first[None, :], second[None, :], factor[None, :], total],
                dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
    sums = tl.sum(total, axis=1) * tl.load(scale + n, mask=there, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + n, sums.to(out.dtype.element_ty), mask=there)
