"""The cast of BF16 to 1x128 groups, on NVIDIA: two values side by side in one register from memory to memory.

As FP32 values, a tile of `cast_kernel` fills the registers of its threads, so that few programs are there to hide the
memory's latency. BF16 is half of an FP32 number, so a pair of neighbours in a row stays one 32-bit word: maxima are
taken of both at once, and values are widened only within the instructions that scale and convert them.

The two layouts have scales of their own and share nothing but what they read. So each has its own program; both run at
the same time, and the second finds the tile in the cache. On an H200 that needs 128 registers a thread instead of 213
and casts at 3.25 TB/s instead of 3.0, where one program of FP32 values reaches 2.4 and a copy 3.9 (same run).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.cast_kernel import scales


@triton.jit
def _larger(a, b):
    """In both halves the larger number; NaN if either is."""
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _magnitudes(pair):
    return pair & 0x7FFF7FFF


@triton.jit
def _even(pair):
    """The first of a pair, as fp32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _odd(pair):
    """The second of a pair, as fp32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _bytes(pair, even_inverse, odd_inverse, FORMAT: tl.constexpr):
    """Pairs times their inverse scales in FP8, as pairs of bytes; FORMAT is Triton's name of the type."""
    even_inverse = tl.broadcast_to(even_inverse, pair.shape)
    odd_inverse = tl.broadcast_to(odd_inverse, pair.shape)
    if FORMAT == "fp8e4nv":
        return tl.inline_asm_elementwise(
            "{.reg .b32 p, q, r, s; .reg .b16 a, b; shl.b32 p, $1, 16; and.b32 q, $1, 0xFFFF0000;"
            " shl.b32 r, $2, 16; and.b32 s, $2, 0xFFFF0000;"
            " mul.f32 p, p, $3; mul.f32 q, q, $5; mul.f32 r, r, $4; mul.f32 s, s, $6;"
            " cvt.rn.satfinite.e4m3x2.f32 a, q, p; cvt.rn.satfinite.e4m3x2.f32 b, s, r; mov.b32 $0, {a, b};}",
            "=r,r,r,r,r,r,r", [pair, even_inverse, odd_inverse], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        "{.reg .b32 p, q, r, s; .reg .b16 a, b; shl.b32 p, $1, 16; and.b32 q, $1, 0xFFFF0000;"
        " shl.b32 r, $2, 16; and.b32 s, $2, 0xFFFF0000;"
        " mul.f32 p, p, $3; mul.f32 q, q, $5; mul.f32 r, r, $4; mul.f32 s, s, $6;"
        " cvt.rn.satfinite.e5m2x2.f32 a, q, p; cvt.rn.satfinite.e5m2x2.f32 b, s, r; mov.b32 $0, {a, b};}",
        "=r,r,r,r,r,r,r", [pair, even_inverse, odd_inverse], dtype=tl.int16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _words(a, b, c, d):
    """Pairs of bytes of four rows as words of four bytes, `a` lowest: those of the even and of the odd columns."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 p, q, r, s; prmt.b32 p, $4, $5, 0x5140; prmt.b32 q, $4, $5, 0x7362;"
        " prmt.b32 r, $6, $7, 0x5140; prmt.b32 s, $6, $7, 0x7362;"
        " prmt.b32 $0, p, r, 0x5410; prmt.b32 $2, p, r, 0x7632;"
        " prmt.b32 $1, q, s, 0x5410; prmt.b32 $3, q, s, 0x7632;}",
        "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _cast_rows(
    x, q, s, tile_k, tile_m, M, K, P, FORMAT: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """The tile as it is, with one scale for each of its rows."""
    pair = tile_k * 64 + tl.arange(0, 64)
    for j in tl.static_range(4):
        m = tile_m * 128 + j * 32 + tl.arange(0, 32)
        inside = m < P
        place = m[:, None].to(tl.int64) * (K // 2) + pair[None, :]
        values = tl.load(x + place, mask=(m < M)[:, None], other=0)
        top = tl.reduce(_magnitudes(values), 1, _larger)
        scale, inverse = scales(_even(_larger(top, top >> 16)), LARGEST, POWER_OF_TWO, True)
        tl.store(s + tile_k.to(tl.int64) * P + m, scale, mask=inside)
        tl.store(q + place, _bytes(values, inverse[:, None], inverse[:, None], FORMAT), mask=inside[:, None])


@triton.jit
def _cast_columns(
    x, qt, st, tile_k, tile_m, M, K, P, FORMAT: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """The tile transposed, with one scale for each of its columns; see `cast_kernel` for its four sub-tiles."""
    pair = tile_k * 64 + tl.arange(0, 64)
    values = ()
    for j in tl.static_range(4):
        m = tile_m * 128 + 4 * tl.arange(0, 32) + j
        place = m[:, None].to(tl.int64) * (K // 2) + pair[None, :]
        values = values + (tl.load(x + place, mask=(m < M)[:, None], other=0),)
    low = _larger(_magnitudes(values[0]), _magnitudes(values[1]))
    high = _larger(_magnitudes(values[2]), _magnitudes(values[3]))
    top = tl.reduce(_larger(low, high), 0, _larger)
    even_scale, even_inverse = scales(_even(top), LARGEST, POWER_OF_TWO, True)
    odd_scale, odd_inverse = scales(_odd(top), LARGEST, POWER_OF_TWO, True)
    place = st + tile_m.to(tl.int64) * K + 2 * pair
    tl.store(place, even_scale)
    tl.store(place + 1, odd_scale)

    made = ()
    for j in tl.static_range(4):
        made = made + (_bytes(values[j], even_inverse[None, :], odd_inverse[None, :], FORMAT),)
    even, odd = _words(made[0], made[1], made[2], made[3])
    i = tile_m * 32 + tl.arange(0, 32)
    inside = (i < P // 4)[None, :]
    place = qt + (2 * pair)[:, None].to(tl.int64) * (P // 4) + i[None, :]
    tl.store(place, tl.trans(even), mask=inside)
    tl.store(place + P // 4, tl.trans(odd), mask=inside)


@triton.jit(do_not_specialize=["M"])  # as for `cast_kernel`
def cast_pairs_kernel(
    x, q, s, qt, st, M, K, P,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One layout of a tile of x [M, K / 2], in pairs: pairs of bytes q [P, K / 2] or words qt [K, P / 4].

    With ROWS and COLUMNS, every second program along the first axis makes the transposed one.
    """
    MAKES: tl.constexpr = 2 if ROWS and COLUMNS else 1
    tile_k = tl.program_id(0) // MAKES
    tile_m = tl.program_id(1)
    if ROWS:  # noqa: SIM102 - a test of the compiler outside, one of the device inside
        if MAKES == 1 or tl.program_id(0) % 2 == 0:
            _cast_rows(x, q, s, tile_k, tile_m, M, K, P, FORMAT, LARGEST, POWER_OF_TWO)
    if COLUMNS:  # noqa: SIM102
        if MAKES == 1 or tl.program_id(0) % 2 == 1:
            _cast_columns(x, qt, st, tile_k, tile_m, M, K, P, FORMAT, LARGEST, POWER_OF_TWO)
