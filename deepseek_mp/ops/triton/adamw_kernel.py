"""The kernels of an AdamW step in one pass: open 8-bit moments, update a weight, and close them.

Two bytes of codes, the gradient, the weight, and its compensation if it has one are read once and written once. One
kernel steps a parameter that it is given, the other each parameter of a table, with the same arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.blocks_kernel import dither, keep, read, write
from deepseek_mp.ops.triton.table_kernel import first_row, in_memory, length, number_of, owner_of, pointer, stream_of


@triton.jit
def _step_rows(
    weight, lacking, grad, first, first_scales, second, second_scales, scale,
    decay, size, root, step, seed, stream, beta1, beta2, eps, row, place, at, count,
    WRITE: tl.constexpr, SCALED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Step some blocks of 256 values: `place` are their values' places in `flatten()`, `at` those in memory.

    WRITE says how the weight is stored; see `blocks_kernel.write`. Unless BLOCKS, moments are fp32.
    """
    inside = place < count
    row_inside = row * 256 < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g * tl.math.div_rn(1.0, tl.load(scale))

    m = read(first, first_scales, place, inside, row, row_inside, True, BLOCKS)
    m = m + (1 - beta1) * (g - m)
    v = read(second, second_scales, place, inside, row, row_inside, False, BLOCKS)
    v = v * beta2 + (1 - beta2) * (g * g)

    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if WRITE == "bf16_kahan":
        w = w + tl.load(lacking + at, mask=inside, other=0.0).to(tl.float32)
    w = w * decay - size * tl.math.div_rn(m, tl.math.div_rn(tl.sqrt_rn(v), root) + eps)

    write(w, weight, lacking, at, inside, row, step, seed, stream, WRITE)
    limit = dither(place, step)
    keep(m, limit, first, first_scales, place, inside, row, row_inside, True, BLOCKS)
    keep(v, limit, second, second_scales, place, inside, row, row_inside, False, BLOCKS)


@triton.jit(do_not_specialize=["step", "seed", "stream"])
def adamw_in_blocks_kernel(
    weight, lacking, grad, first, first_scales, second, second_scales, skip, scale,
    decay, size, root, step, seed, stream, count, beta1, beta2, eps,
    WRITE: tl.constexpr, ON_DEVICE: tl.constexpr, SCALED: tl.constexpr, SKIPPABLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A step of `count` values; see `adamw.py`. With ON_DEVICE, decay, size, root and step are pointers to them."""
    if SKIPPABLE:
        count = tl.where(tl.load(skip) == 0.0, count, 0)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    if ON_DEVICE:
        decay, size, root, step = tl.load(decay), tl.load(size), tl.load(root), tl.load(step)
    _step_rows(
        weight, lacking, grad, first, first_scales, second, second_scales, scale,
        decay, size, root, step, seed, stream, beta1, beta2, eps, row, place, place, count, WRITE, SCALED, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["step", "seed"])
def adamw_of_many_kernel(
    table, owners, grads, skip, scale, decay, size, root, step, seed, beta1, beta2, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
    BLOCKS: tl.constexpr, WRITE: tl.constexpr, ON_DEVICE: tl.constexpr, SCALED: tl.constexpr,
    SKIPPABLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A step of the parameters of a table; see `adamw.py`.

    With ON_DEVICE, `decay` is a pointer to it, and size, root and step are vectors of one number for each parameter.
    """
    owner, line = owner_of(table, owners)
    count = length(line, skip, SKIPPABLE, ALIGNED)
    row = first_row(line, ROWS) + tl.arange(0, ROWS)
    place = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    if ON_DEVICE:
        number = number_of(line)
        decay, size, root = tl.load(decay), tl.load(size + number), tl.load(root + number)
        step = tl.load(step + number)
    _step_rows(
        pointer(line, WEIGHT, ALIGNED), pointer(line + 1, WEIGHT, ALIGNED), pointer(grads + owner, GRAD, ALIGNED),
        pointer(line + 8, "int8" if BLOCKS else "fp32", ALIGNED), pointer(line + 9, "fp32", ALIGNED),
        pointer(line + 10, "uint8" if BLOCKS else "fp32", ALIGNED), pointer(line + 11, "fp32", ALIGNED), scale,
        decay, size, root, step, seed, stream_of(line), beta1, beta2, eps,
        row, place, in_memory(line, place, PERMUTED), count, WRITE, SCALED, BLOCKS,
    )  # fmt: skip
