"""The kernels of a step of SGD with momentum in one pass: open 8-bit momentum, update a weight, and close it.

One kernel steps a parameter that it is given, the other each parameter of a table, with the same arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.blocks_kernel import dither, keep, read, write
from deepseek_mp.ops.triton.table_kernel import first_row, in_memory, length, number_of, owner_of, pointer, stream_of


@triton.jit
def _step_rows(
    weight, lacking, grad, buffer, scales, scale, rate, entering, step, seed, stream, momentum, weight_decay,
    row, place, at, count, WRITE: tl.constexpr, NESTEROV: tl.constexpr, SCALED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Step some blocks of 256 values: `place` are their values' places in `flatten()`, `at` those in memory.

    WRITE says how the weight is stored; see `blocks_kernel.write`. Unless BLOCKS, moments are fp32.
    """
    inside = place < count
    row_inside = row * 256 < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g * tl.math.div_rn(1.0, tl.load(scale))
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if WRITE == "bf16_kahan":
        w = w + tl.load(lacking + at, mask=inside, other=0.0).to(tl.float32)
    g = g + weight_decay * w

    m = read(buffer, scales, place, inside, row, row_inside, True, BLOCKS)
    m = m * momentum + entering * g
    w = w - rate * ((g + momentum * m) if NESTEROV else m)

    write(w, weight, lacking, at, inside, row, step, seed, stream, WRITE)
    keep(m, dither(place, step), buffer, scales, place, inside, row, row_inside, True, BLOCKS)


@triton.jit(do_not_specialize=["step", "seed", "stream"])
def sgd_in_blocks_kernel(
    weight, lacking, grad, buffer, scales, skip, scale,
    rate, entering, step, seed, stream, count, momentum, weight_decay,
    WRITE: tl.constexpr, NESTEROV: tl.constexpr, ON_DEVICE: tl.constexpr, SCALED: tl.constexpr,
    SKIPPABLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A step of `count` values; see `sgd.py`. With ON_DEVICE, rate, entering and step are pointers to them."""
    if SKIPPABLE:
        count = tl.where(tl.load(skip) == 0.0, count, 0)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    if ON_DEVICE:
        rate, entering, step = tl.load(rate), tl.load(entering), tl.load(step)
    _step_rows(
        weight, lacking, grad, buffer, scales, scale, rate, entering, step, seed, stream, momentum, weight_decay,
        row, place, place, count, WRITE, NESTEROV, SCALED, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["step", "seed"])
def sgd_of_many_kernel(
    table, owners, grads, skip, scale, rate, entering, step, seed, momentum, weight_decay,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
    BLOCKS: tl.constexpr, WRITE: tl.constexpr, NESTEROV: tl.constexpr, ON_DEVICE: tl.constexpr, SCALED: tl.constexpr,
    SKIPPABLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A step of the parameters of a table; see `sgd.py`.

    With ON_DEVICE, `rate` is a pointer to it, and entering and step are vectors of one number for each parameter.
    """
    owner, line = owner_of(table, owners)
    count = length(line, skip, SKIPPABLE, ALIGNED)
    row = first_row(line, ROWS) + tl.arange(0, ROWS)
    place = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    if ON_DEVICE:
        number = number_of(line)
        rate, entering, step = tl.load(rate), tl.load(entering + number), tl.load(step + number)
    _step_rows(
        pointer(line, WEIGHT, ALIGNED), pointer(line + 1, WEIGHT, ALIGNED), pointer(grads + owner, GRAD, ALIGNED),
        pointer(line + 8, "int8" if BLOCKS else "fp32", ALIGNED), pointer(line + 9, "fp32", ALIGNED), scale,
        rate, entering, step, seed, stream_of(line), momentum, weight_decay,
        row, place, in_memory(line, place, PERMUTED), count, WRITE, NESTEROV, SCALED, BLOCKS,
    )  # fmt: skip
