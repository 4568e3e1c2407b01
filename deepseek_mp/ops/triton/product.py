"""`product` as a Triton kernel, for devices whose library has no block-scaled FP8 product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.layouts import PAIRS
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.product_kernel import product_kernel


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is divided: sizes of a tile and how many share a group's rows, and what a program is made of."""

    a: int = 128
    b: int = 128
    c: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 4
    scales_ahead: int | None = None
    per_processor: int = 1
    """Programs on a processor at a time: while one adds its scaled sums, another multiplies."""


TILINGS: Mapping[tuple[str, str], Tiling] = MappingProxyType(
    {
        ("1x128", "128x128"): Tiling(a=64, group=16, warps=4, stages=3, per_processor=2),
        ("1x128", "1x128"): Tiling(b=64, group=16, warps=4, stages=3, per_processor=2),
        # A step of 32 is too short to wait for its scales.
        ("1x32", "1x32"): Tiling(c=32, scales_ahead=4),
    }
)
"""The fastest of some twenty on an H200; a right operand of 128x128 needs a `b` that divides 128."""


def product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    pair: tuple[str, str],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `ops.schema.product`. `ConfigError` for a pair of granularities that the kernel does not have."""
    if pair not in PAIRS:
        allowed = ", ".join(" with ".join(known) for known in PAIRS)
        raise ConfigError(explain(f"a Triton product of {' with '.join(pair)} scales", allowed, "Use 'reference'"))
    outer, contraction = left.shape
    inner = right.shape[0]
    out = left.new_empty((outer, inner), dtype=dtype)
    if not contraction:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    tiling = TILINGS.get(pair, Tiling())
    tiles = -(-outer // tiling.a) * -(-inner // tiling.b)
    if tiles:
        with on_device(left.device):
            product_kernel[(min(tiles, tiling.per_processor * _processors(left.device)),)](
                TensorDescriptor.from_tensor(left, [tiling.a, tiling.c]), left_scale,
                TensorDescriptor.from_tensor(right, [tiling.b, tiling.c]), right_scale,
                bias, TensorDescriptor.from_tensor(out, [tiling.a, tiling.b]), outer, inner, contraction,
                LEFT=pair[0], RIGHT=pair[1], HAS_BIAS=bias is not None,
                BLOCK_A=tiling.a, BLOCK_B=tiling.b, BLOCK_C=tiling.c, GROUP=tiling.group,
                SCALES_AHEAD=tiling.scales_ahead, num_warps=tiling.warps, num_stages=tiling.stages,
            )  # fmt: skip
    return out


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
