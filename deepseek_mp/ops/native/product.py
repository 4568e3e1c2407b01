"""`product` as `torch._scaled_mm`, which calls the vendor's library.

It takes the second operand column-major, so as [B, C] transposed, and scales in these shapes:
tensor [] and []; row [A, 1] and [1, B]; 1x128 [A, C/128] with the outer extent contiguous, on the right
[C/128, B]; 128x128 on the right [C/128, B/128] with the contraction contiguous.

Products with row scales give BF16 only, except where cuBLAS makes them: since CUDA 12.9, on Hopper
(aten/src/ATen/native/cuda/ScaledBlas.cpp). On a CPU some builds of PyTorch have none (oneDNN in torch 2.11).
Row scales are the same along the whole sum, so they leave it: there the unscaled FP32 product is scaled afterwards.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain

PAIRS = (("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"), ("1x128", "1x128"))
BLOCK = 128
READ_TOGETHER = 4
"""cuBLAS reads the scales of that many 128x128 blocks at once. With a number of blocks that is no multiple of
it, torch 2.11 gives results that are wrong by orders of magnitude, without an error."""
_CUBLAS_ROWS_SINCE = (12, 9)


@torch.no_grad()
def product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    pair: tuple[str, str],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `ops.schema.product`. `ConfigError` for a pair of granularities that the library does not have."""
    if pair not in PAIRS:
        allowed = ", ".join(" with ".join(known) for known in PAIRS)
        raise ConfigError(explain(f"a native product of {' with '.join(pair)} scales", allowed, "Use 'triton'"))
    outer, contraction = left.shape
    if not contraction or not outer:
        out = left.new_zeros((outer, right.shape[0]), dtype=dtype)
        return out if bias is None else out + bias.to(dtype)
    if pair == ("row", "row") and not _has_row_scales(left.device, dtype):
        return _scaled_afterwards(left, left_scale, right, right_scale, bias, dtype)
    if pair[1] == "128x128" and contraction // BLOCK % READ_TOGETHER:
        # By row, which has no such rule: the same scale 128 times.
        pair, right_scale = ("1x128", "1x128"), right_scale.repeat_interleave(BLOCK, 0).t().contiguous()
    # The library adds a bias of the result's own 16-bit type only.
    inside = bias if bias is not None and dtype is bias.dtype and dtype is not torch.float32 else None
    out = torch._scaled_mm(  # noqa: SLF001 - its public successor is younger than the torch this package supports
        left,
        right.t(),
        _left(left_scale, pair[0]),
        _right(right_scale, pair[1]),
        bias=inside,
        out_dtype=dtype,
        use_fast_accum=False,
    )
    return out if bias is None or inside is not None else out + bias.to(dtype)


def _scaled_afterwards(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    one = left_scale.new_ones(())
    out = torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)  # noqa: SLF001
    out = out.mul_(left_scale[:, None]).mul_(right_scale)
    return (out if bias is None else out + bias).to(dtype)


@cache
def _has_row_scales(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library makes products with row scales there, with results of this type."""
    if device.type != "cuda":
        return False
    if dtype is torch.bfloat16:
        return True
    version = torch.version.cuda
    if version is None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    major, minor = map(int, version.split(".")[:2])
    return (major, minor) >= _CUBLAS_ROWS_SINCE


def _left(scale: Tensor, granularity: str) -> Tensor:
    if granularity == "row":
        return scale[:, None]
    return scale.t() if granularity == "1x128" else scale


def _right(scale: Tensor, granularity: str) -> Tensor:
    if granularity == "row":
        return scale[None, :]
    return scale.t() if granularity == "128x128" else scale
