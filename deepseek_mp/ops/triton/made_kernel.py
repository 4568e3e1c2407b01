"""Kernels that cast what they compute themselves; see `cast_kernel.py` for how a tile is cast."""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.activation_kernel import source_value
from deepseek_mp.ops.triton.cast_kernel import cast_tile, finite_magnitude, raise_to


@triton.jit
def _source_tile(
    x, up, g, tile_k, tile_m, M, K,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, GRAD: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The values of a tile in the four sub-tiles that `cast_tile` takes."""
    k = tile_k * 128 + tl.arange(0, 128)
    quarter = tile_m * 128 + 4 * tl.arange(0, 32)
    values = ()
    for j in tl.static_range(4):
        m = quarter + j
        place = m[:, None].to(tl.int64) * K + k[None, :]
        inside = (m < M)[:, None] & (k < K)[None, :]
        values = values + (source_value(x, up, g, place, inside, ACTIVATION, GATE, GRAD, PTX),)
    return values


@triton.jit(do_not_specialize=["M"])
def cast_made_kernel(
    x, up, g, amax, top, seen, q, s, qt, st, M, K, P,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, GRAD: tl.constexpr,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, GRANULARITY: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`cast_kernel` of the source of x, up and g [M, K]; those that it does not read may be anything."""
    tile_k = tl.program_id(0)
    tile_m = tl.program_id(1)
    values = _source_tile(x, up, g, tile_k, tile_m, M, K, ACTIVATION, GATE, GRAD, PTX)
    cast_tile(
        values, values, amax, amax, top, seen, q, s, qt, st, K, P,
        tile_k, tile_m, tl.num_programs(0), tl.num_programs(1),
        FORMAT, LARGEST, GRANULARITY, POWER_OF_TWO, ROWS, COLUMNS, PTX, 0.0, 0.0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def cast_gate_grads_kernel(
    x, up, g, amax, x_top, x_seen, x_q, x_s, x_qt, x_st, up_top, up_seen, up_q, up_s, up_qt, up_st,
    value_top, value_qt, value_st, M, K, P,
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, VALUE_FORMAT: tl.constexpr, VALUE_LARGEST: tl.constexpr,
    GRANULARITY: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Both gradients of f(x) * up [M, K], and with VALUE_FORMAT that itself, transposed.

    Every second (third) program makes the same of them, so that each needs the registers of one. Those that own a
    tile run at the same time: x, up and g come from memory once.
    """
    MAKES: tl.constexpr = 2 if VALUE_FORMAT is None else 3
    makes = tl.program_id(0) % MAKES
    tile_k = tl.program_id(0) // MAKES
    tile_m = tl.program_id(1)
    tiles_k = tl.num_programs(0) // MAKES
    tiles_m = tl.num_programs(1)
    if makes == 0:
        of_x = _source_tile(x, up, g, tile_k, tile_m, M, K, ACTIVATION, True, True, PTX)
        cast_tile(
            of_x, of_x, amax, amax, x_top, x_seen, x_q, x_s, x_qt, x_st, K, P, tile_k, tile_m, tiles_k, tiles_m,
            FORMAT, LARGEST, GRANULARITY, POWER_OF_TWO, ROWS, COLUMNS, PTX, 0.0, 0.0,
        )  # fmt: skip
    elif makes == 1:
        of_up = _source_tile(x, g, g, tile_k, tile_m, M, K, ACTIVATION, True, False, PTX)
        cast_tile(
            of_up, of_up, amax + 1, amax + 1, up_top, up_seen, up_q, up_s, up_qt, up_st, K, P, tile_k, tile_m, tiles_k,
            tiles_m, FORMAT, LARGEST, GRANULARITY, POWER_OF_TWO, ROWS, COLUMNS, PTX, 0.0, 0.0,
        )  # fmt: skip
    elif VALUE_FORMAT is not None:
        value = _source_tile(x, up, g, tile_k, tile_m, M, K, ACTIVATION, True, False, PTX)
        cast_tile(
            value, value, amax + 2, amax + 2, value_top, amax + 2, value_qt, value_st, value_qt, value_st, K, P,
            tile_k, tile_m, tiles_k, tiles_m,
            VALUE_FORMAT, VALUE_LARGEST, GRANULARITY, POWER_OF_TWO, False, True, PTX, 0.0, 0.0,
        )  # fmt: skip


@triton.jit
def _amax_of_source(
    x, up, g, amax, count, ACTIVATION: tl.constexpr, GATE: tl.constexpr, GRAD: tl.constexpr, PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = source_value(x, up, g, place, place < count, ACTIVATION, GATE, GRAD, PTX)
    raise_to(amax, tl.max(finite_magnitude(value, PTX)))


@triton.jit
def unknown_made_amax_kernel(
    x, up, g, amax, top, count, ACTIVATION: tl.constexpr, GATE: tl.constexpr, GRAD: tl.constexpr, PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitude of `count` values of a source into amax [], where top [] is zero.

    Elsewhere nothing is read and amax, which starts as zero, stays as it is.
    """
    if tl.load(top) == 0.0:
        _amax_of_source(x, up, g, amax, count, ACTIVATION, GATE, GRAD, PTX, BLOCK)


@triton.jit
def unknown_gate_amax_kernel(
    x, up, g, amax, x_top, up_top, value_top, count,
    ACTIVATION: tl.constexpr, VALUE: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`unknown_made_amax_kernel` for both gradients of f(x) * up, and with VALUE for that itself, into amax [3]."""
    if tl.load(x_top) == 0.0:
        _amax_of_source(x, up, g, amax, count, ACTIVATION, True, True, PTX, BLOCK)
    if tl.load(up_top) == 0.0:
        _amax_of_source(x, g, g, amax + 1, count, ACTIVATION, True, False, PTX, BLOCK)
    if VALUE:  # noqa: SIM102 - a test of the compiler outside, one of the device inside
        if tl.load(value_top) == 0.0:
            _amax_of_source(x, up, g, amax + 2, count, ACTIVATION, True, False, PTX, BLOCK)
