"""The values that a format has, by its own numbers: the distance between neighbours, and rounding to the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.precision import FORMATS, Format, find_format

_EXPONENT = 0x7F800000
"""The bits of fp32's exponent."""
_HALF = 0x400000
"""Half of a step of the exponent; also 2**-127."""
_NORMAL = 0x800000
"""The bits of the smallest normal number."""
_SIGN = -(1 << 31)
_FP32 = FORMATS["fp32"]
_CAST = ("bf16", "fp16")
"""Formats whose casts PyTorch has everywhere, with infinities where they overflow."""


def spacing(x: Tensor, format: Format) -> Tensor:
    """Distance between the two values of the format around each number, were its range without an end.

    Args:
        x: fp32 of any shape; infinities and NaN have no neighbours.
        format: of at most fp32's exponent and mantissa bits.

    Returns:
        fp32 powers of two, of the shape of x; infinity or NaN where that is not finite.
    """
    if not format.is_float:
        return torch.ones_like(x)
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32)
    return power.mul_(format.epsilon).clamp_min_(format.smallest_subnormal)


def nearest(x: Tensor, format: Format) -> Tensor:
    """The value of the format nearest to each number, ties to even, for numbers that do not exceed its largest.

    Args:
        x: fp32 of any shape, with magnitudes of at most `format.max`; NaN stays NaN.
        format: of at most fp32's exponent and mantissa bits.

    Returns:
        fp32 numbers that the format holds.
    """
    # Exact but for the rounding: a step is a power of two, and a value of the format is a whole number of steps.
    step = spacing(x, format)
    rounded = (x / step).round_().mul_(step)
    return rounded if format.has_negative_zero else rounded + 0.0


def round_to_format(x: Tensor, format: str | Format) -> Tensor:
    """The value of the format nearest to each number, ties to even, as a tensor of the type of x.

    Any format goes, also one that PyTorch has no type for, by its exponent and mantissa bits. What rounds above the
    largest value becomes infinity where the format has one, else NaN where it has that, else the largest value.
    Infinities become NaN where the format has none. NaN stays NaN, whether the format has it or not. The scale format
    e8m0 has neither signs nor zero: a negative number is NaN there, and zero its smallest value.

    Args:
        x: floating, of any shape. fp64 is rounded to fp32 first, unless the format is fp64.
        format: the format or its name. Those at least as wide as fp32 leave narrower tensors as they are.

    Returns:
        The rounded numbers, of the shape and type of x, which rounds them again if it is narrower than the format.
    """
    target = find_format(format)
    if target.mantissa_bits >= _FP32.mantissa_bits and target.exponent_bits >= _FP32.exponent_bits:
        return x.float().to(x.dtype) if target == _FP32 else x
    wide = x.float()
    if target.name in _CAST and target == FORMATS[target.name]:
        return wide.to(torch_dtype(target.name)).to(x.dtype)
    if target.exponent_bits == _FP32.exponent_bits and target.special == "ieee":
        return keep_mantissa(wide, target.mantissa_bits).to(x.dtype)
    if target == FORMATS["e8m0"]:
        return _nearest_power(wide).to(x.dtype)
    return _without_overflow(wide, nearest(wide, target), target).to(x.dtype)


def _nearest_power(x: Tensor) -> Tensor:
    """e8m0: the exponent alone, raised where the mantissa is at least half.

    On the bits, as the smallest value is subnormal in fp32, which some devices take for zero.
    """
    size = x.view(torch.int32) & ~_SIGN
    # Below the normal numbers there is no hidden bit: three quarters of the way to them are half of the last step.
    raised = (size + torch.where(size < _NORMAL, _HALF // 2, _HALF).int()) & _EXPONENT
    scale = raised.clamp_min_(_HALF).view(torch.float32)  # 2**-127
    return torch.where((x < 0) | (raised == _EXPONENT) | x.isnan(), float("nan"), scale)


def _without_overflow(x: Tensor, rounded: Tensor, target: Format) -> Tensor:
    """The rounded numbers, with what the format has for those beyond its largest value."""
    if target.special == "scale":
        rounded = torch.where(x < 0, float("nan"), rounded.clamp_min(target.smallest_subnormal))
    beyond = rounded.abs() > target.max
    if target.has_inf:
        return torch.where(beyond | (x.abs() == float("inf")), float("inf") * x.sign(), rounded)
    if target.has_nan:
        return torch.where(beyond, float("nan"), rounded)
    return rounded.clamp(-target.max, target.max)


def keep_mantissa(x: Tensor, bits: int) -> Tensor:
    """fp32 numbers rounded to so many mantissa bits, ties to even: what tf32 and hf32 do to their operands.

    Args:
        x: fp32 of any shape. Infinities and NaN stay; what rounds above the largest value becomes infinity.
        bits: mantissa bits to keep, from 1 to 22.

    Returns:
        fp32, of the shape of x.
    """
    dropped = _FP32.mantissa_bits - bits
    raw = x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    even = (raw >> dropped) & 1
    rounded = (raw + half + even) & -(1 << dropped)
    return torch.where(x.isnan(), x, rounded.view(torch.float32))
