"""Saved tensors in bits and in FP8 groups in plain PyTorch, in several passes."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.reference.product import dequantise

PIECE = 1 << 22
"""Values that are taken out of FP8 at once, so that no FP32 tensor of the full size is needed beside them."""


def unpack_groups(values: Tensor, scale: Tensor, rest: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    """See `ops.packing.unpack_groups`."""
    group = values.shape[1]
    whole = count - (0 if rest is None else rest.numel())
    flat = values.new_empty(count, dtype=dtype)
    step = PIECE // group
    for start in range(0, whole // group, step):
        piece = dequantise(values[start : start + step], scale[:, start : start + step], f"1x{group}")
        part = flat[start * group : min(start * group + piece.numel(), whole)]
        part.copy_(piece.flatten()[: part.numel()])
    if rest is not None:
        flat[whole:] = rest
    return flat


def pack_bits(x: Tensor, rule: str) -> Tensor:
    """See `ops.packing.pack_bits`."""
    mask = x if x.dtype == torch.bool else ~(x <= 0) if rule == "not_below" else x > 0
    count = mask.numel()
    bits = mask.new_zeros((count + 7) // 8 * 8, dtype=torch.uint8)
    bits[:count] = mask
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.view(-1, 8).bitwise_left_shift(shifts).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int, dtype: torch.dtype, one: Tensor | None) -> Tensor:
    """See `ops.packing.unpack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed[:, None].bitwise_right_shift(shifts).bitwise_and_(1).flatten()
    flat = bits[:count].to(dtype)
    return flat if one is None else flat * one
