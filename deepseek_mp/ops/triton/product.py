"""`product` as a Triton kernel, for devices whose library has no block-scaled FP8 product."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.layouts import PAIRS
from deepseek_mp.ops.triton.product_kernel import product_kernel

BLOCK, GROUP, STAGES = 128, 8, 4


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
    tiles = -(-outer // BLOCK) * -(-inner // BLOCK)
    if tiles:
        # A step of 32 is too short to wait for its scales.
        step, ahead = (32, STAGES) if pair == ("1x32", "1x32") else (BLOCK, None)
        product_kernel[(min(tiles, _processors(left.device)),)](
            TensorDescriptor.from_tensor(left, [BLOCK, step]), left_scale,
            TensorDescriptor.from_tensor(right, [BLOCK, step]), right_scale,
            bias, TensorDescriptor.from_tensor(out, [BLOCK, BLOCK]), outer, inner, contraction,
            LEFT=pair[0], RIGHT=pair[1], HAS_BIAS=bias is not None, BLOCK_A=BLOCK, BLOCK_B=BLOCK, BLOCK_C=step,
            GROUP=GROUP, SCALES_AHEAD=ahead, num_warps=8, num_stages=STAGES,
        )  # fmt: skip
    return out


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
