"""What saved tensors are held in, in the order of memory: single bits, and FP8 values with a scale for each group.

Both implementations give the same bits. Triton needs one pass, and one launch, for each.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from deepseek_mp.backends import capabilities
from deepseek_mp.ops.choose import choose, has_kernels, packing_of

Rule = Literal["above", "not_below"]
"""Which values of a tensor are ones: those above zero, or those that are not zero or below, NaN among them."""


@torch.no_grad()
def unpack_groups(values: Tensor, scale: Tensor, rest: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    """The numbers that FP8 groups stand for, [count], in `dtype`; each product is made in FP32 and rounded once.

    Args:
        values: FP8 [rows, group], scale: fp32 [1, rows], as `ops.schema.quantise` gives them; there may be rows more
            than the numbers need.
        rest: what follows the last whole group, as it is, in `dtype`; None: nothing.
        count: of all numbers, the rest included.
    """
    run = packing_of("unpack_groups", _with_fp8(values.device, f"1x{values.shape[1]}"))
    return run(values, scale, rest, count, dtype)


@torch.no_grad()
def pack_bits(x: Tensor, rule: Rule = "above") -> Tensor:
    """uint8 [n / 8], rounded up: which values of x [n], floating or bool, follow the rule; the lowest bit first.

    Bits beyond the last value are zero.
    """
    return packing_of("pack_bits", _of_bits(x.device))(x, rule)


@torch.no_grad()
def unpack_bits(packed: Tensor, count: int, dtype: torch.dtype, one: Tensor | None = None) -> Tensor:
    """[count] in `dtype`: zeros, and in the place of ones 1 or, where given, the number `one` [] of that type."""
    return packing_of("unpack_bits", _of_bits(packed.device))(packed, count, dtype, one)


@cache
def _with_fp8(device: torch.device, granularity: str) -> str:
    """Only devices with FP8 units convert from FP8."""
    return choose("quantise", [granularity], capabilities(device))


@cache
def _of_bits(device: torch.device) -> str:
    return "triton" if has_kernels(device) else "reference"
