"""The kernel of an AdamW step in one pass: opens 8-bit moments, updates a weight, and closes them.

Two bytes of codes, the gradient, the weight, and its compensation if it has one are read once and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deepseek_mp.ops.triton.blocks_kernel import close, dither, opened, write


@triton.jit(do_not_specialize=["step", "seed", "stream"])
def adamw_in_blocks_kernel(
    weight, lacking, grad, first, first_scales, second, second_scales, skip, scale,
    decay, size, root, step, seed, stream, count, beta1, beta2, eps,
    WRITE: tl.constexpr, ON_DEVICE: tl.constexpr, SCALED: tl.constexpr, SKIPPABLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A step of `count` values; see `adamw.py`. With ON_DEVICE, decay, size, root and step are pointers to them.

    WRITE says how the weight is stored; see `blocks_kernel.write`.
    """
    if SKIPPABLE:
        count = tl.where(tl.load(skip) == 0.0, count, 0)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = place < count
    row_inside = row * 256 < count
    if ON_DEVICE:
        decay, size, root, step = tl.load(decay), tl.load(size), tl.load(root), tl.load(step)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g * tl.math.div_rn(1.0, tl.load(scale))

    m = opened(first, first_scales, place, inside, row, row_inside, True)
    m = m + (1 - beta1) * (g - m)
    v = opened(second, second_scales, place, inside, row, row_inside, False)
    v = v * beta2 + (1 - beta2) * (g * g)

    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    if WRITE == "bf16_kahan":
        w = w + tl.load(lacking + place, mask=inside, other=0.0).to(tl.float32)
    w = w * decay - size * tl.math.div_rn(m, tl.math.div_rn(tl.sqrt_rn(v), root) + eps)

    write(w, weight, lacking, place, inside, row, step, seed, stream, WRITE)
    limit = dither(place, step)
    close(m, limit, first, first_scales, place, inside, row, row_inside, True)
    close(v, limit, second, second_scales, place, inside, row, row_inside, False)
