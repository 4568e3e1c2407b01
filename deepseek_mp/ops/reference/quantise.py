"""`quantise` and `quantise_delayed` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.layouts import alignment, padded_rows, scale_shape
from deepseek_mp.ops.operands import Cast, Operands
from deepseek_mp.ops.reference.stochastic import round_stochastically, uniform
from deepseek_mp.precision import FORMATS, Format

SMALLEST_SCALE = 2.0**-126
"""The smallest normal fp32 number: its inverse is finite."""


@torch.no_grad()
def quantise(x: Tensor, cast: Cast, seed: Tensor | None = None) -> Operands:
    """See `ops.schema.quantise`."""
    return _both(x, cast, None, seed)


@torch.no_grad()
def quantise_delayed(x: Tensor, top: Tensor, amax: Tensor, cast: Cast) -> Operands:
    """See `ops.schema.quantise_delayed`."""
    own = torch.zeros_like(amax)
    if x.numel():
        size = x.float().abs()
        own = torch.where(size < float("inf"), size, 0.0).amax()
    amax.copy_(torch.maximum(amax, own))
    return _both(x, cast, torch.where(top == 0, own, top), None)


def _both(x: Tensor, cast: Cast, top: Tensor | None, seed: Tensor | None) -> Operands:
    """Both layouts, as far as they are asked for; scales hold `top` where it is given."""
    count, width = x.shape
    padded = x.new_zeros((padded_rows(count, cast.granularity), width), dtype=torch.float32)
    padded[:count] = x
    drawn = None if seed is None else uniform(seed, *padded.shape)
    nothing = x.new_empty(0, dtype=torch_dtype(cast.format)), x.new_empty(0, dtype=torch.float32)
    q, s = _operand(padded, cast, top, drawn) if cast.rows else nothing
    qt, st = nothing[0].clone(), nothing[1].clone()  # an op's results may not be one tensor
    if cast.columns:
        qt, st = _operand(padded.t().contiguous(), cast, top, None if drawn is None else drawn.t())
    return q, s, qt, st


def _operand(x: Tensor, cast: Cast, top: Tensor | None, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
    """An operand [outer, contraction] in fp32 as FP8 values and their scales.

    `drawn`, of the same shape, decides where values are rounded to; without it they are rounded to the nearest.
    """
    outer, contraction = x.shape
    target, granularity = FORMATS[cast.format], cast.granularity
    dtype, stored = torch_dtype(target.name), scale_shape(granularity, outer, contraction)
    if not x.numel():
        return x.new_empty(x.shape, dtype=dtype), torch.full(stored, SMALLEST_SCALE, device=x.device)
    height, length = _group(granularity, outer, contraction)
    groups = x.view(outer // height, height, contraction // length, length)
    size = groups.abs()
    finite = size < float("inf")
    considered = size if height == 1 else torch.where(finite, size, 0.0)
    amax = considered.amax((1, 3), keepdim=True) if top is None else top.view(1, 1, 1, 1)
    scale, inverse = scales_of(amax, target, power_of_two=cast.power_of_two)
    # Rounding may exceed the largest value by a hair, which some versions of PyTorch cast to NaN. A value beyond a
    # given `top` exceeds it by more.
    scaled = (groups * inverse).clamp(-target.max, target.max)
    values = torch.where(finite, scaled, float("nan")).view(outer, contraction)
    if drawn is not None:
        values = round_stochastically(values, target, drawn)
    values = values.to(dtype)
    scale = scale[:, 0, :, 0]
    scale = scale.t().contiguous() if granularity in ("1x128", "1x32") else scale.contiguous()
    return values, scale.view(stored)


def scales_of(amax: Tensor, target: Format, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Scale and inverse of groups with these largest magnitudes, fp32 of any shape; NaN where those are not finite."""
    # Tensors and not Python numbers: on CUDA a division by a number is a product with its inverse.
    largest = torch.full_like(amax, target.max)
    top = torch.where(amax < float("inf"), torch.maximum(amax, largest * SMALLEST_SCALE), float("nan"))
    scale = top * torch.ones_like(amax).div(largest)
    if not power_of_two:
        # A quarter on both sides changes no bit but of the largest numbers: their inverse is subnormal, which some
        # devices take for zero.
        return scale, torch.ones_like(amax).div(top * 0.25) * (largest * 0.25)
    bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000  # up to the next power of two
    rounded, inverse = bits.view(torch.float32), (0x7F000000 - bits).view(torch.float32)
    return torch.where(scale.isnan(), scale, rounded), torch.where(scale.isnan(), scale, inverse)


def _group(granularity: str, outer: int, contraction: int) -> tuple[int, int]:
    """Rows and columns of a group."""
    block = alignment(granularity)
    groups = {"tensor": (outer, contraction), "row": (1, contraction), "128x128": (block, block)}
    return groups.get(granularity, (1, block))
