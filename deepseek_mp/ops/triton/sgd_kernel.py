"""The kernel of a step of SGD with momentum in one pass: opens 8-bit momentum, updates a weight, and closes it."""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.blocks_kernel import close, dither, opened, write


@triton.jit(do_not_specialize=["step", "seed", "stream"])
def sgd_in_blocks_kernel(
    weight, lacking, grad, buffer, scales, skip, scale,
    rate, entering, step, seed, stream, count, momentum, weight_decay,
    WRITE: tl.constexpr, NESTEROV: tl.constexpr, ON_DEVICE: tl.constexpr, SCALED: tl.constexpr,
    SKIPPABLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A step of `count` values; see `sgd.py`. With ON_DEVICE, rate, entering and step are pointers to them.

    WRITE says how the weight is stored; see `blocks_kernel.write`.
    """
    if SKIPPABLE:
        count = tl.where(tl.load(skip) == 0.0, count, 0)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = place < count
    row_inside = row * 256 < count
    if ON_DEVICE:
        rate, entering, step = tl.load(rate), tl.load(entering), tl.load(step)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g * tl.math.div_rn(1.0, tl.load(scale))
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    if WRITE == "bf16_kahan":
        w = w + tl.load(lacking + place, mask=inside, other=0.0).to(tl.float32)
    g = g + weight_decay * w

    m = opened(buffer, scales, place, inside, row, row_inside, True)
    m = m * momentum + entering * g
    w = w - rate * ((g + momentum * m) if NESTEROV else m)

    write(w, weight, lacking, place, inside, row, step, seed, stream, WRITE)
    close(m, dither(place, step), buffer, scales, place, inside, row, row_inside, True)
