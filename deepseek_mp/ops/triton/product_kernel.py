"""The kernel of a scaled FP8 product: partial sums over 128 values, scaled and added in FP32.

FP8 matrix units add with fewer bits than FP32 has (about 14 on Hopper). Leaving them every 128
products bounds that error, and it is where the scales of 1x128 and 128x128 blocks change anyway
(DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2). Scales of 1x32 change every 32 products: there
BLOCK_C is 32, one instruction of Hopper's matrix units, which have no 1x32 scales of their own.

Tiles are read through tensor descriptors, which the copy engine of newer devices serves, and a program
goes on to the next tile until none is left.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    left, left_scale, right, right_scale, bias, out, A, B, C,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
    SCALES_AHEAD: tl.constexpr,
):  # fmt: skip
    """out [A, B] = (left [A, C] * scales) @ (right [B, C] * scales).T (+ bias [B]); all three are descriptors.

    Tiles are read some steps ahead of their product; SCALES_AHEAD has their scales read so many ahead too, if not None.
    """
    tiles_a = tl.cdiv(A, BLOCK_A)
    tiles_b = tl.cdiv(B, BLOCK_B)
    for tile in range(tl.program_id(0), tiles_a * tiles_b, tl.num_programs(0)):
        # Tiles of a group share their rows of the right operand while these are in the cache.
        first_a = tile // (GROUP * tiles_b) * GROUP
        height = tl.minimum(tiles_a - first_a, GROUP)
        row = (first_a + tile % (GROUP * tiles_b) % height) * BLOCK_A
        column = tile % (GROUP * tiles_b) // height * BLOCK_B
        a = row + tl.arange(0, BLOCK_A)
        b = column + tl.arange(0, BLOCK_B)

        total = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
        for step in tl.range(tl.cdiv(C, BLOCK_C), num_stages=SCALES_AHEAD):
            partial = tl.dot(left.load([row, step * BLOCK_C]), right.load([column, step * BLOCK_C]).T)
            if LEFT == "1x128" or LEFT == "1x32":
                scale = tl.load(left_scale + step * A + a, mask=a < A, other=0.0)
                if RIGHT == "128x128":
                    whole = tl.load(right_scale + (column // 128) * (C // 128) + step)
                    total += partial * (scale * whole)[:, None]
                else:
                    other_scale = tl.load(right_scale + step * B + b, mask=b < B, other=0.0)
                    total += partial * scale[:, None] * other_scale[None, :]
            else:
                total += partial
        if LEFT == "tensor":
            total *= tl.load(left_scale) * tl.load(right_scale)
        if LEFT == "row":
            total *= tl.load(left_scale + a, mask=a < A, other=0.0)[:, None]
            total *= tl.load(right_scale + b, mask=b < B, other=0.0)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + b, mask=b < B, other=0.0).to(tl.float32)[None, :]
        out.store([row, column], total.to(out.dtype))
