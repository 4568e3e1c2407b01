"""`fp8_linear` as `torch._scaled_mm` with a scale for each row on both sides.

Any number of rows is right for the library: K and N alone lie along its 16 bytes. In eager code rows are padded to
whole 16s all the same, which costs the kernel that casts them nothing, and is what training's products were tested
with. Compiled code does not pad, since that would be a step for every number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.choose import has_kernels, row_cast_of
from deepseek_mp.precision import find_format

LARGEST = find_format("fp8_e4m3").max
SMALLEST = LARGEST * 2.0**-126
"""A row's largest magnitude counts as this at least, as in `ops.schema.quantise`: so the inverse scale is finite."""


@torch.no_grad()
def fp8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.fp8_linear.fp8_linear`."""
    if not has_kernels(x.device):
        return plain(x, q, scale, bias)
    values, row_scale = row_cast_of("triton")(x.contiguous())
    return cast_product(values, row_scale[:, None], q, scale, bias, x.dtype)[: len(x)]


def plain(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same in ops that a compiler sees through."""
    values, row_scale = plain_row_cast(x.contiguous())
    return cast_product(values, row_scale, q, scale, bias, x.dtype)


def plain_row_cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] in FP8 [M, K], and their scales [M, 1]; a row that is not finite is NaN, its scale too."""
    wide = x.float()
    amax = wide.abs().amax(1, keepdim=True)
    top = torch.where(amax < float("inf"), amax.clamp(min=SMALLEST), float("nan"))
    # A quarter on both sides: the inverse of the largest numbers is subnormal.
    values = (wide * (LARGEST * 0.25 / (top * 0.25))).to(torch.float8_e4m3fn)
    return values, top * (1 / LARGEST)


def cast_product(
    values: Tensor, row_scale: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Of rows that were cast [M, K], with scales [M, 1], and a weight, in a dtype."""
    inside = bias if bias is not None and bias.dtype is dtype else None  # the library adds no other
    out = torch._scaled_mm(  # noqa: SLF001 - its public successor is younger than the torch this package supports
        values, q.t(), row_scale, scale[None, :], bias=inside, out_dtype=dtype, use_fast_accum=False
    )
    return out if bias is None or inside is not None else out + bias.to(dtype)
