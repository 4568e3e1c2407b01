"""The kernels of max pooling: channels are innermost, and a program has some positions and some of their channels.

What depends on a position is computed once for it: divisions, edges, addresses. Windows of few cells are unrolled, so
that each cell's number is known when the kernel is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _larger(best, cell, place, inside, number):
    """The larger of what was found so far and cell `number`, at `place`; of NaN the last."""
    value = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
    wins = (value > best) | (value != value)
    return tl.where(wins, value, best), tl.where(wins, number, cell)


@triton.jit(do_not_specialize=["count", "H", "W", "down", "across"])
def max_pool_kernel(
    x, values, offsets, count, C, H, W, down, across, by_image, by_row, by_column,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    UNROLLED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Values and offsets [count, C] of x, whose images, rows and columns are `by_...` numbers apart.

    A position is one of the `count` outputs: of all images, [down, across].
    """
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    image = position // (down * across)
    rest = position - image * (down * across)
    top = rest // across
    left = (rest - top * across) * SW - PW
    top = top * SH - PH
    place = image.to(tl.int64) * by_image + top.to(tl.int64) * by_row + left.to(tl.int64) * by_column
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    there = (position < count)[:, None] & (c < C)
    best = tl.full([POSITIONS, CHANNELS], float("-inf"), dtype=tl.float32)
    # Of nothing but -inf, the first cell inside is named.
    first = tl.maximum(-top, 0) * KW + tl.maximum(-left, 0)
    cell = first[:, None] + tl.zeros([POSITIONS, CHANNELS], dtype=tl.int32)
    if UNROLLED:
        for row in tl.static_range(KH):
            for column in tl.static_range(KW):
                inside = (top + row >= 0) & (top + row < H) & (left + column >= 0) & (left + column < W)
                best, cell = _larger(
                    best, cell, x + (place + row * by_row + column * by_column)[:, None] + c,
                    there & inside[:, None], row * KW + column,
                )  # fmt: skip
    else:
        for row in range(KH):
            for column in range(KW):
                inside = (top + row >= 0) & (top + row < H) & (left + column >= 0) & (left + column < W)
                best, cell = _larger(
                    best, cell, x + (place + row * by_row + column * by_column)[:, None] + c,
                    there & inside[:, None], row * KW + column,
                )  # fmt: skip
    out = position.to(tl.int64)[:, None] * C + c
    tl.store(values + out, best.to(values.dtype.element_ty), mask=there)
    tl.store(offsets + out, cell.to(tl.uint8), mask=there)


@triton.jit
def _named(total, g, offsets, g_place, place, c, inside, number):
    """The sum so far, and the gradient of an output that named cell `number`."""
    cell = tl.load(offsets + place[:, None] + c, mask=inside, other=255)
    value = tl.load(g + g_place[:, None] + c, mask=inside, other=0.0).to(tl.float32)
    return total + tl.where(cell == number, value, 0.0)


@triton.jit(do_not_specialize=["count", "H", "W", "down", "across", "rows", "columns"])
def max_pool_backward_kernel(
    g, offsets, out, count, C, H, W, down, across, rows, columns, by_image, by_row, by_column,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    UNROLLED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of the input, out [images, H, W, C], from g, whose images, rows and columns are `by_...` apart.

    A position is a block of SH x SW inputs, [rows, columns] for each image: for all blocks the same cells of the same
    neighbouring windows hold an input. Of block (a, b), input (i, j) is in row a * SH + i - PH, and in the window of
    output (a - m, b - n) it is cell (i + m * SH, j + n * SW). So m and n fall, for a sum in the order of the outputs.
    """
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    image = position // (rows * columns)
    rest = position - image * (rows * columns)
    a = rest // columns
    b = rest - a * columns + PW // SW
    a += PH // SH
    wide = image.to(tl.int64)
    g_place = wide * by_image + a.to(tl.int64) * by_row + b.to(tl.int64) * by_column
    place = ((wide * down + a) * across + b) * C
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    there = (position < count)[:, None] & (c < C)
    M: tl.constexpr = (KH + SH - 1) // SH
    N: tl.constexpr = (KW + SW - 1) // SW
    if UNROLLED:
        for i in tl.static_range(SH):
            for j in tl.static_range(SW):
                total = tl.zeros([POSITIONS, CHANNELS], dtype=tl.float32)
                for m in tl.static_range(M - 1, -1, -1):
                    for n in tl.static_range(N - 1, -1, -1):
                        if i + m * SH < KH and j + n * SW < KW:
                            inside = (a >= m) & (a - m < down) & (b >= n) & (b - n < across)
                            total = _named(
                                total, g, offsets, g_place - (m * by_row + n * by_column), place - (m * across + n) * C,
                                c, there & inside[:, None], (i + m * SH) * KW + j + n * SW,
                            )  # fmt: skip
                _store(out, total, wide, a * SH + i - PH, b * SW + j - PW, H, W, C, c, there)
    else:
        for input in range(SH * SW):
            i = input // SW
            j = input % SW
            total = tl.zeros([POSITIONS, CHANNELS], dtype=tl.float32)
            for window in range(M * N):
                m = M - 1 - window // N
                n = N - 1 - window % N
                inside = (a >= m) & (a - m < down) & (b >= n) & (b - n < across)
                inside = inside & (i + m * SH < KH) & (j + n * SW < KW)
                total = _named(
                    total, g, offsets, g_place - (m * by_row + n * by_column), place - (m * across + n) * C,
                    c, there & inside[:, None], (i + m * SH) * KW + j + n * SW,
                )  # fmt: skip
            _store(out, total, wide, a * SH + i - PH, b * SW + j - PW, H, W, C, c, there)


@triton.jit
def _store(out, total, image, row, column, H, W, C, c, there):
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    place = ((image * H + row) * W + column) * C
    tl.store(out + place[:, None] + c, total.to(out.dtype.element_ty), mask=there & inside[:, None])
