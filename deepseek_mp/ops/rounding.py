"""Tensors rounded to the values that an operand recipe can hold: what a recipe does to its operands, emulated.

Any operand of any recipe goes: plain formats, and formats of every width with scales of every granularity. For FP8 the
result is what `quantise` gives when it is taken back to fp32, bit for bit; FP4 and INT8 follow the same rules. Sizes
need no multiple: groups at the far edges may be short.

**Scales of a format of their own** (`OperandRecipe.scale_format`) have two levels, as NVFP4 has them ("Pretraining
large language models with NVFP4", arXiv 2509.25149). With fmax the largest value of the format and smax
that of the scale format, all in fp32:

    whole = amax of the tensor / (fmax * smax)
    scale = the value of the scale format nearest to (amax of the group / fmax) / whole
    x is rounded to the nearest value of the format times scale * whole, which does not exceed fmax * scale * whole

Where `scale` is rounded down, the largest of a group are cut a little. A group so small that `scale` is zero becomes
zeros.

**What is not finite** becomes NaN, and with it its whole group where groups are of one row; `ops.schema.quantise` says
why. It takes no part in a scale of more than one row.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.backends import capabilities
from deepseek_mp.errors import FormatError, ShapeError, explain
from deepseek_mp.ops.cast import FP8
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.grid import nearest, round_to_format
from deepseek_mp.ops.layouts import ALIGNMENT, alignment
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.reference.quantise import SMALLEST_SCALE, scales_of
from deepseek_mp.ops.reference.stochastic import round_stochastically
from deepseek_mp.ops.schema import quantise
from deepseek_mp.precision import FORMATS, Format, Granularity, Rounding
from deepseek_mp.precision.recipe import OperandRecipe

_WIDEST = FORMATS["fp32"]
_BF16_BITS = FORMATS["bf16"].mantissa_bits + 1


class Factored(NamedTuple):
    """A rounded tensor as fp32 values times one number: the two can be multiplied out of a product."""

    values: Tensor
    """In fp32, of the tensor's shape; numbers that BF16 holds where `fits_bf16` says so."""
    factor: Tensor | None
    """fp32 []; None: one."""


@torch.no_grad()
def rounded(x: Tensor, side: OperandRecipe, *, generator: torch.Generator | None = None) -> Tensor:
    """x rounded to values that the operand recipe can hold.

    Scales of past steps (`delayed`) are taken from x itself. Unscaled formats overflow as casts do: fp16 to infinity.

    Args:
        x: [outer, contraction], floating; any shape if the operand is unscaled or has one scale for the tensor.
        side: the operand recipe. fp32 and fp64 return x as it is.
        generator: what random numbers are drawn from, where the recipe rounds stochastically; None: PyTorch's own.

    Returns:
        The rounded numbers in the shape and type of x. A type narrower than fp32 may round them again.

    Raises:
        FormatError: the operand has scales and a format that has no use for them (wider than fp32, or e8m0).
        ShapeError: x is no matrix and the granularity is of parts of one.
    """
    if not side.is_scaled:
        return x if side.format.bits >= _WIDEST.bits else round_to_format(x, side.format)
    if x.device.type != "cpu" and _has_kernel(x, side):
        return _by_kernel(x, side)
    values, factor = factored(x, side, generator=generator)
    return (values if factor is None else values * factor).to(x.dtype)


def _has_kernel(x: Tensor, side: OperandRecipe) -> bool:
    """Whether the cast that trains makes the same values in one pass: `quantise` as a kernel, of this shape."""
    name = side.granularity.name
    return (
        side.scale_format is None
        and side.rounding == Rounding.NEAREST
        and name in ALIGNMENT
        and x.dim() == 2
        and x.numel() > 0
        and x.shape[1] % alignment(name) == 0
        and _kernel_for(x.device, side.format.name) is not None
    )


def _by_kernel(x: Tensor, side: OperandRecipe) -> Tensor:
    """Quantised by the kernel and taken back; rows that were added to fill a block are cut off."""
    name = side.granularity.name
    values, scale, _, _ = quantise(x.contiguous(), side.format.name, name, side.power_of_two, True, False, "triton")
    return dequantise(values, scale, name)[: x.shape[0]].to(x.dtype)


@cache
def _kernel_for(device: torch.device, format: str) -> str | None:
    """'triton' where the device has kernels for casts to this format."""
    native = format in FP8 and format in capabilities(device).matmul_formats
    return "triton" if native and find_spec("triton") is not None else None


@torch.no_grad()
def factored(x: Tensor, side: OperandRecipe, *, generator: torch.Generator | None = None) -> Factored:
    """`rounded` in fp32 and in two factors: the values, and the one scale of the tensor where the recipe has that."""
    _check(x, side)
    if not side.is_scaled or not x.numel():
        return Factored(rounded(x.float(), side) if x.numel() else x.float(), None)
    if _is_whole(side.granularity):
        return _rounded_groups(x.float(), side, generator)
    values, factor = _rounded_groups(_grouped(x.float(), side.granularity), side, generator)
    return Factored(values.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]], factor)


def can_round(side: OperandRecipe) -> bool:
    """Whether tensors can be rounded to the operand's values and FP32 holds them."""
    return side.format.bits <= _WIDEST.bits and side.format.special != "scale"


def fits_bf16(side: OperandRecipe) -> bool:
    """Whether `factored` gives values that BF16 holds exactly, but for subnormal ones."""
    bits = side.format.mantissa_bits + 1
    if side.is_scaled and not _is_whole(side.granularity) and not side.power_of_two:
        if side.scale_format is None:
            return False
        bits += side.scale_format.mantissa_bits + 1
    # The exponent is that of FP32, of which all scales are.
    return bits <= _BF16_BITS


def _check(x: Tensor, side: OperandRecipe) -> None:
    if not side.is_scaled:
        return
    if not can_round(side):
        allowed = ", ".join(name for name, f in FORMATS.items() if f.bits <= _WIDEST.bits and f.special != "scale")
        raise FormatError(explain(f"an operand of {side.format} with scales", allowed, "Use one of these formats"))
    if x.dim() != 2 and not _is_whole(side.granularity):
        passed = f"a tensor of shape {list(x.shape)} to round with {side.granularity.name} scales"
        raise ShapeError(explain(passed, "matrices [outer, contraction]", "Flatten it to the operand of its product"))


def _is_whole(granularity: Granularity) -> bool:
    return granularity.rows is None and granularity.columns is None


def _grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """The matrix, with zeros up to whole groups, as [groups down, rows, groups across, columns]."""
    outer, contraction = x.shape
    rows, columns = granularity.rows or outer, granularity.columns or contraction
    down, across = granularity.scales(outer, contraction)
    missing = down * rows - outer, across * columns - contraction
    if any(missing):
        x = F.pad(x, (0, missing[1], 0, missing[0]))
    return x.contiguous().view(down, rows, across, columns)


def _rounded_groups(groups: Tensor, side: OperandRecipe, generator: torch.Generator | None) -> Factored:
    """Groups, as `_grouped` gives them, each rounded under its own scale; or a tensor of any shape under one scale."""
    target = side.format
    size = groups.abs()
    # As `quantise` does: what is not finite makes a group of one row NaN, and takes no part in the scale of others.
    spans = side.granularity.rows != 1
    considered = torch.where(size < float("inf"), size, 0.0) if spans else size
    if _is_whole(side.granularity):
        amax = considered.amax()
    else:
        amax = considered.amax(3, keepdim=True).amax(1, keepdim=True)
    factor = None
    if side.scale_format is not None:
        scale, inverse, factor = _two_levels(amax, target, side.scale_format)
    else:
        scale, inverse = scales_of(amax, target, power_of_two=side.power_of_two)
    scaled = (groups * inverse).clamp_(-target.max, target.max)
    if spans:
        scaled = torch.where(size < float("inf"), scaled, float("nan"))
    if side.rounding == Rounding.STOCHASTIC:
        drawn = torch.rand(scaled.shape, generator=generator, device=scaled.device)
        values = round_stochastically(scaled, target, drawn)
    else:
        values = _nearest(scaled, target)
    if factor is None and not scale.dim():
        return Factored(values, scale)
    return Factored(values * scale, factor)


def _two_levels(amax: Tensor, target: Format, stored: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of groups in the format `stored`, in units of one for the tensor; the inverse of both; the one."""
    # Tensors and not Python numbers: on CUDA a division by a number is a product with its inverse.
    largest, most = torch.full_like(amax, target.max), torch.full((), target.max * stored.max, device=amax.device)
    finite = amax < float("inf")
    top = torch.where(finite, amax, 0.0).amax()
    whole = torch.maximum(top, most * SMALLEST_SCALE) / most
    scale = torch.where(finite, round_to_format(amax / largest / whole, stored), float("nan"))
    # Finite, so that zeros stay zeros: the scale may be zero, and its product with a tiny `whole` subnormal.
    inverse = (torch.ones_like(amax) / (scale * whole)).clamp_max(torch.finfo(torch.float32).max)
    return scale, inverse, whole


def _nearest(x: Tensor, target: Format) -> Tensor:
    """Numbers in the format's range to the nearest, by the device's own cast where that is one pass."""
    if x.is_cuda and target.name in FP8 and target == FORMATS[target.name]:
        return x.to(torch_dtype(target.name)).float()
    return nearest(x, target)
