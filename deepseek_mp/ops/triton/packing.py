"""Saved tensors in bits and in FP8 groups by Triton: one launch for each of them, and one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.packing_kernel import pack_bits_kernel, unpack_bits_kernel, unpack_groups_kernel

VALUES = 4096
"""Of a program: 16 in each thread. Not measured."""
WARPS = 8


def unpack_groups(values: Tensor, scale: Tensor, rest: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    """See `ops.packing.unpack_groups`."""
    out = values.new_empty(count, dtype=dtype)
    group = values.shape[1]
    block = VALUES // group
    with on_device(values.device):
        unpack_groups_kernel[(-(-count // VALUES),)](
            values, scale, out if rest is None else rest, out, count - (0 if rest is None else rest.numel()), count,
            GROUP=group, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return out


def pack_bits(x: Tensor, rule: str) -> Tensor:
    """See `ops.packing.pack_bits`."""
    count = x.numel()
    packed = x.new_empty(-(-count // 8), dtype=torch.uint8)
    flat = x.view(torch.uint8) if x.dtype == torch.bool else x
    with on_device(x.device):
        pack_bits_kernel[(-(-count // VALUES),)](flat, packed, count, RULE=rule, BLOCK=VALUES // 8, num_warps=WARPS)
    return packed


def unpack_bits(packed: Tensor, count: int, dtype: torch.dtype, one: Tensor | None) -> Tensor:
    """See `ops.packing.unpack_bits`."""
    out = packed.new_empty(count, dtype=dtype)
    bytes_ = out.view(torch.uint8) if dtype == torch.bool else out
    with on_device(packed.device):
        unpack_bits_kernel[(-(-count // VALUES),)](
            packed, packed if one is None else one, bytes_, count,
            HAS_ONE=one is not None, BLOCK=VALUES // 8, num_warps=WARPS,
        )  # fmt: skip
    return out
