"""The kernel that casts a matrix to FP8 in one pass: scales, values, and the transposed values.

A program owns a tile of 128 x 128 values. FP8 values are one byte, and moving single bytes across
threads is what makes a transposing cast slow. So the tile is read as four sub-tiles, the j-th holding
the rows 4i + j: the four bytes that stand one below the other in a column are then in one thread, are
packed into a 32-bit word, and the transposed tile is written in words.

With 1x32 scales a row of the tile has four groups, and a column too: rows 8n to 8n + 7 of the four sub-tiles
are rows 32n to 32n + 31 of the tile.

The kernel is limited by instructions before it is limited by memory: no value is clamped, since none is
larger than what its scale was taken from (with a delayed scale the cast itself saturates), and in groups of one
row NaN travels through the scale. On NVIDIA the cast is written in PTX: compiled by Triton 3.6, bytes that are
both stored and packed came out wrong in one of the two places.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 128


@triton.jit
def larger(a, b):
    """The larger number; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite_magnitude(value, PTX: tl.constexpr = False):
    """Magnitudes, with zero in the place of infinities and NaN: those must not become a scale."""
    if PTX:  # behind computed values, LLVM gathers the comparisons in a mask of bits and takes them out one by one
        return tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .f32 t; abs.f32 t, $1; setp.lt.f32 p, t, 0f7F800000; selp.f32 $0, t, 0f00000000, p;}",
            "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    size = tl.abs(value)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def _tile_top(values, PTX: tl.constexpr):
    """The largest finite magnitude of a tile."""
    low = tl.maximum(finite_magnitude(values[0], PTX), finite_magnitude(values[1], PTX))
    high = tl.maximum(finite_magnitude(values[2], PTX), finite_magnitude(values[3], PTX))
    return tl.max(tl.maximum(low, high))


@triton.jit
def _row_tops(value, GRANULARITY: tl.constexpr):
    """The largest magnitude of every row of a sub-tile [32], of every 1x32 group [32, 4]; NaN if there is one."""
    if GRANULARITY == "1x32":
        top = tl.reduce(tl.reshape(tl.abs(value), (32, 4, 32)), 2, larger)
    else:
        top = tl.reduce(tl.abs(value), 1, larger)
    return top


@triton.jit
def _column_tops(values, GRANULARITY: tl.constexpr):
    """The largest magnitude of every column of a tile [128], of every 1x32 group [4, 128]; NaN if there is one."""
    # The four sub-tiles value by value first: that costs no exchange between threads.
    size = larger(larger(tl.abs(values[0]), tl.abs(values[1])), larger(tl.abs(values[2]), tl.abs(values[3])))
    if GRANULARITY == "1x32":
        top = tl.reduce(tl.reshape(size, (4, 8, 128)), 1, larger)
    else:
        top = tl.reduce(size, 0, larger)
    return top


@triton.jit
def _by_row(value, inverse, GRANULARITY: tl.constexpr):
    """A sub-tile times the inverses of its rows or groups, shaped as `_row_tops`."""
    if GRANULARITY == "1x32":
        scaled = tl.reshape(tl.reshape(value, (32, 4, 32)) * inverse[:, :, None], (32, 128))
    else:
        scaled = value * inverse[:, None]
    return scaled


@triton.jit
def _by_column(value, inverse, GRANULARITY: tl.constexpr):
    """A sub-tile times the inverses of the tile's columns or groups, shaped as `_column_tops`."""
    if GRANULARITY == "1x32":
        scaled = tl.reshape(tl.reshape(value, (4, 8, 128)) * inverse[:, None, :], (32, 128))
    else:
        scaled = value * inverse[None, :]
    return scaled


@triton.jit
def _store_row_scales(s, scale, tile_k, m, K, P, GRANULARITY: tl.constexpr):
    """The scales of rows m, or of their groups in a tile, to where `ops.layouts` has them."""
    if GRANULARITY == "1x32":
        group = tile_k * 4 + tl.arange(0, 4)
        inside = (m < P)[:, None] & (group < K // 32)[None, :]
        tl.store(s + group[None, :].to(tl.int64) * P + m[:, None], scale, mask=inside)
    elif GRANULARITY == "1x128":
        tl.store(s + tile_k.to(tl.int64) * P + m, scale, mask=m < P)
    elif tile_k == 0:
        tl.store(s + m, scale, mask=m < P)


@triton.jit
def _store_column_scales(st, scale, tile_m, k, K, P, GRANULARITY: tl.constexpr):
    """The scales of columns k, or of their groups in a tile, to where `ops.layouts` has them."""
    if GRANULARITY == "1x32":
        group = tile_m * 4 + tl.arange(0, 4)
        inside = (group < P // 32)[:, None] & (k < K)[None, :]
        tl.store(st + group[:, None].to(tl.int64) * K + k[None, :], scale, mask=inside)
    elif GRANULARITY == "1x128":
        tl.store(st + tile_m.to(tl.int64) * K + k, scale, mask=k < K)
    elif tile_m == 0:
        tl.store(st + k, scale, mask=k < K)


@triton.jit
def raise_to(place, size):
    """The fp32 number at `place` becomes at least `size`; both are positive or zero."""
    # Positive floats are ordered as their bits are, and integers have an atomic maximum everywhere.
    tl.atomic_max(place.to(tl.pointer_type(tl.int32)), size.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def scales(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, PTX: tl.constexpr):
    """The dequantisation scale of a group and its inverse; see `ops.schema.quantise`. Both NaN for infinity and NaN."""
    SMALLEST: tl.constexpr = LARGEST * 1.1754943508222875e-38
    INVERSE: tl.constexpr = 1.0 / LARGEST
    top = tl.where(amax < float("inf"), tl.maximum(amax, SMALLEST), float("nan"))
    scale = top * INVERSE
    if POWER_OF_TWO:
        # Round up: add all mantissa bits, then keep the exponent. The inverse has the mirrored exponent.
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.where(scale == scale, bits.to(tl.float32, bitcast=True), scale)
        return scale, tl.where(scale == scale, (0x7F000000 - bits).to(tl.float32, bitcast=True), scale)
    # A quarter on both sides, as in `ops.reference.quantise`: the inverse of the largest numbers is subnormal.
    top = top * 0.25
    if PTX:  # the correctly rounded reciprocal has an instruction sequence shorter than that of a division
        inverse = tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=r,r", [top], dtype=tl.float32, is_pure=True, pack=1)
    else:
        inverse = tl.math.div_rn(1.0, top)
    return scale, inverse * (LARGEST * 0.25)


@triton.jit
def _fraction(word):
    """Random words of 32 bits as fp32 numbers, multiples of 2**-24 in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _uniform(seed, i, k, K):
    """The random numbers of rows 4i, 4i + 1, 4i + 2 and 4i + 3; see `ops.reference.stochastic`."""
    counter = i[:, None].to(tl.int64) * K + k[None, :]
    low = counter.to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero)
    return _fraction(a), _fraction(b), _fraction(c), _fraction(d)


@triton.jit
def _rounded(scaled, uniform, LARGEST: tl.constexpr, EPSILON: tl.constexpr, SMALLEST: tl.constexpr):
    """Values next to those given, as `ops.reference.stochastic` chooses them; those given if EPSILON is 0."""
    if EPSILON == 0.0:
        return scaled
    # Clamped, as what exceeds the largest value by a hair would be taken to the step above it.
    size = tl.minimum(tl.abs(scaled), LARGEST, propagate_nan=tl.PropagateNan.ALL)
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power * EPSILON, SMALLEST)
    # The inverse of a power of two has the mirrored exponent.
    steps = size * (0x7F000000 - step.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    below = tl.floor(steps)
    size = tl.where(uniform < steps - below, below + 1.0, below) * step
    return tl.where(scaled < 0.0, -size, size)


@triton.jit
def fp8_bytes(scaled, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """The values in FP8, as bytes; FORMAT is Triton's name of the type."""
    if PTX and FORMAT == "fp8e4nv":
        return tl.inline_asm_elementwise(
            "{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;"
            " mov.b32 $0, {a, b};}",
            "=r,r,r,r,r", [scaled], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    if PTX and FORMAT == "fp8e5":
        return tl.inline_asm_elementwise(
            "{.reg .b16 a, b; cvt.rn.satfinite.e5m2x2.f32 a, $2, $1; cvt.rn.satfinite.e5m2x2.f32 b, $4, $3;"
            " mov.b32 $0, {a, b};}",
            "=r,r,r,r,r", [scaled], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    return scaled.to(tl.dtype(FORMAT)).to(tl.uint8, bitcast=True)


@triton.jit
def _words(a, b, c, d, PTX: tl.constexpr):
    """Four bytes of equal place in four tensors as one word, `a` lowest."""
    if PTX:
        # A transposition of 4 x 4 bytes: eight byte permutations for sixteen values.
        return tl.inline_asm_elementwise(
            "{.reg .b32 p, q, r, s; prmt.b32 p, $4, $5, 0x5140; prmt.b32 q, $4, $5, 0x7362;"
            " prmt.b32 r, $6, $7, 0x5140; prmt.b32 s, $6, $7, 0x7362;"
            " prmt.b32 $0, p, r, 0x5410; prmt.b32 $1, p, r, 0x7632;"
            " prmt.b32 $2, q, s, 0x5410; prmt.b32 $3, q, s, 0x7632;}",
            "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=tl.uint32, is_pure=True, pack=4,
        )  # fmt: skip
    low = a.to(tl.uint32) | (b.to(tl.uint32) << 8)
    return low | (c.to(tl.uint32) << 16) | (d.to(tl.uint32) << 24)


@triton.jit(do_not_specialize=["M"])  # a matrix of one row would get code of its own, which was seen to be wrong
def cast_kernel(
    x, seed, amax, column_amax, top, seen, q, s, qt, st, M, K, P,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, GRANULARITY: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PTX: tl.constexpr, EPSILON: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """One tile of [M, K] to bytes q [P, K] and words qt [K, P / 4]; see `quantise.py` for the scales' layouts.

    EPSILON and SMALLEST, the format's step above one and its smallest value, say that `seed` decides the rounding.
    """
    tile_k = tl.program_id(0)
    tile_m = tl.program_id(1)
    k = tile_k * 128 + tl.arange(0, 128)
    quarter = tile_m * 128 + 4 * tl.arange(0, 32)
    inside_k = k < K

    values = ()
    for j in tl.static_range(4):
        m = quarter + j
        place = m[:, None].to(tl.int64) * K + k[None, :]
        loaded = tl.load(x + place, mask=(m < M)[:, None] & inside_k[None, :], other=0.0)
        values = values + (loaded.to(tl.float32),)
    uniform = values
    if EPSILON != 0.0:
        uniform = _uniform(tl.load(seed), tile_m * 32 + tl.arange(0, 32), k, K)
    cast_tile(
        values, uniform, amax, column_amax, top, seen, q, s, qt, st, K, P,
        tile_k, tile_m, tl.num_programs(0), tl.num_programs(1),
        FORMAT, LARGEST, GRANULARITY, POWER_OF_TWO, ROWS, COLUMNS, PTX, EPSILON, SMALLEST,
    )  # fmt: skip


@triton.jit
def cast_tile(
    values, uniform, amax, column_amax, top, seen, q, s, qt, st, K, P, tile_k, tile_m, tiles_k, tiles_m,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, GRANULARITY: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PTX: tl.constexpr, EPSILON: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """The fp32 values of a tile, four sub-tiles that hold zeros beyond the matrix, to what `cast_kernel` writes.

    `uniform` are four sub-tiles of random numbers; anything if EPSILON is 0, which rounds to the nearest.
    """
    k = tile_k * 128 + tl.arange(0, 128)
    quarter = tile_m * 128 + 4 * tl.arange(0, 32)
    inside_k = k < K

    if GRANULARITY == "1x128" or GRANULARITY == "1x32":
        column_scale, column_inverse = scales(_column_tops(values, GRANULARITY), LARGEST, POWER_OF_TWO, PTX)
        if COLUMNS:
            _store_column_scales(st, column_scale, tile_m, k, K, P, GRANULARITY)
    elif GRANULARITY == "128x128":
        whole_scale, whole_inverse = scales(_tile_top(values, PTX), LARGEST, POWER_OF_TWO, PTX)
        if ROWS:
            tl.store(s + tile_m * tiles_k + tile_k, whole_scale)
        if COLUMNS:
            tl.store(st + tile_k * tiles_m + tile_m, whole_scale)
    elif GRANULARITY == "tensor" or GRANULARITY == "delayed":
        held = tl.load(amax)
        if GRANULARITY == "delayed":
            raise_to(seen, _tile_top(values, PTX))
            known = tl.load(top)
            held = tl.where(known == 0.0, held, known)
        whole_scale, whole_inverse = scales(held, LARGEST, POWER_OF_TWO, PTX)
        if (tile_m == 0) & (tile_k == 0):
            if ROWS:
                tl.store(s, whole_scale)
            if COLUMNS:
                tl.store(st, whole_scale)
    else:
        given = tl.load(column_amax + k, mask=inside_k, other=0.0)
        column_scale, column_inverse = scales(given, LARGEST, POWER_OF_TWO, PTX)
        if COLUMNS:
            _store_column_scales(st, column_scale, tile_m, k, K, P, GRANULARITY)

    column_bytes = ()
    for j in tl.static_range(4):
        m = quarter + j
        inside_m = m < P
        value = values[j]
        if GRANULARITY == "1x128" or GRANULARITY == "1x32" or GRANULARITY == "row":
            if ROWS:
                if GRANULARITY == "row":
                    row_top = tl.load(amax + m, mask=inside_m, other=0.0)
                else:
                    row_top = _row_tops(value, GRANULARITY)
                row_scale, row_inverse = scales(row_top, LARGEST, POWER_OF_TWO, PTX)
                _store_row_scales(s, row_scale, tile_k, m, K, P, GRANULARITY)
                scaled = _rounded(_by_row(value, row_inverse, GRANULARITY), uniform[j], LARGEST, EPSILON, SMALLEST)
                row_byte = fp8_bytes(scaled, FORMAT, PTX)
            if COLUMNS:
                scaled = _by_column(value, column_inverse, GRANULARITY)
                scaled = _rounded(scaled, uniform[j], LARGEST, EPSILON, SMALLEST)
                column_bytes = column_bytes + (fp8_bytes(scaled, FORMAT, PTX),)
        else:
            # One scale for many rows: only what is not finite itself may become NaN. The second product is
            # zero for all finite values.
            scaled = value * whole_inverse
            if GRANULARITY == "delayed" and not PTX:  # PTX's cast saturates, others give NaN
                scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
            scaled = _rounded(scaled, uniform[j], LARGEST, EPSILON, SMALLEST)
            row_byte = fp8_bytes(scaled + value * 0.0, FORMAT, PTX)
            column_bytes = column_bytes + (row_byte,)
        if ROWS:
            place = m[:, None].to(tl.int64) * K + k[None, :]
            tl.store(q + place, row_byte, mask=inside_m[:, None] & inside_k[None, :])

    if COLUMNS:
        words = _words(column_bytes[0], column_bytes[1], column_bytes[2], column_bytes[3], PTX)
        i = tile_m * 32 + tl.arange(0, 32)
        place = k[:, None].to(tl.int64) * (P // 4) + i[None, :]
        tl.store(qt + place, tl.trans(words), mask=inside_k[:, None] & (i < P // 4)[None, :])
