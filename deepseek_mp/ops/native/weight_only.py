"""`weight_only_linear` as `torch._weight_int8pack_mm`, which multiplies BF16 with int8 on CPUs.

Its scales are in the dtype of x. In BF16 they would all be off by up to 2**-9, so it gets ones, and the scales come
after it in fp32. It crashes where rows are no multiple of 16 (seen with torch 2.13), and with x in fp32 or fp16 it is
slow: both are refused here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain

WIDTH = 32
"""Rows are multiples of it."""


@torch.no_grad()
def weight_only_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.weight_only.weight_only_linear`. `ConfigError` for operands that the library does not take."""
    outer, width = x.shape
    on_cpu = {x.device.type, q.device.type} == {"cpu"}
    if x.dtype is not torch.bfloat16 or q.dtype is not torch.int8 or width % WIDTH or not on_cpu:
        passed = f"a native product of {x.dtype} and {q.dtype} of width {width} on {x.device}"
        allowed = f"bf16 and int8, a width that is a multiple of {WIDTH}, on a CPU"
        raise ConfigError(explain(passed, allowed, "Use 'reference'"))
    if not outer or not width or not len(q):
        out = x.new_zeros((outer, len(q)), dtype=torch.float32)
    else:
        sums: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), q, torch.ones_like(scale, dtype=x.dtype))  # noqa: SLF001
        out = sums.float().mul_(scale)
    return (out if bias is None else out.add_(bias)).to(x.dtype)
