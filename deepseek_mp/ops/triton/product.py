"""`product` as a Triton kernel, for devices whose library has no block-scaled FP8 product."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_mp.ops.triton.product_kernel import product_kernel

BLOCK, GROUP = 128, 8


def product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    pair: tuple[str, str],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `ops.schema.product`."""
    outer, contraction = left.shape
    inner = right.shape[0]
    out = left.new_empty((outer, inner), dtype=dtype)
    if not contraction:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    tiles = -(-outer // BLOCK) * -(-inner // BLOCK)
    if tiles:
        tile = [BLOCK, BLOCK]
        product_kernel[(min(tiles, _processors(left.device)),)](
            TensorDescriptor.from_tensor(left, tile), left_scale, TensorDescriptor.from_tensor(right, tile),
            right_scale, bias, TensorDescriptor.from_tensor(out, tile), outer, inner, contraction,
            LEFT=pair[0], RIGHT=pair[1], HAS_BIAS=bias is not None,
            BLOCK_A=BLOCK, BLOCK_B=BLOCK, BLOCK_C=BLOCK, GROUP=GROUP, num_warps=8, num_stages=4,
        )  # fmt: skip
    return out


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
