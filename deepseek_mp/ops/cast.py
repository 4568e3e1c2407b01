"""One conversion between number formats for all devices, with what was lost counted.

What a cast does on overflow differs: PyTorch to 2.11 turned a value above the range of fp8_e4m3
into NaN, 2.12 and later into the largest value; first-generation Ascend does so for fp16. A check
*after* the cast therefore sees nothing, here or there. So the losses are counted from the input,
and the result is made the same everywhere:

- `saturate=False`: overflow gives an infinity in formats that have one, NaN in those that do not;
- `saturate=True`: overflow and infinities give the largest finite value. NaN stays NaN.

Rounding is to nearest, ties to even, as in IEEE 754 and the OCP 8-bit specification. A value
overflows when it *rounds* above the largest one: halfway to the next step, where the tie goes up
if the last mantissa bit of the largest value is set. (On a device whose own FP16 saturates, an
infinity cannot be stored and reads 65504; the count is right there too.)

fp8 exists in two kinds whose equal bytes mean different values (OCP, and AMD's fnuz with half the
value); `read_fp8` converts stored bytes by value and never reinterprets them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, inf, log2, nan

import torch
from torch import Tensor

from deepseek_mp.errors import FormatError, explain
from deepseek_mp.ops.dtypes import DTYPES, torch_dtype
from deepseek_mp.ops.grid import keep_mantissa
from deepseek_mp.precision import FORMATS, Format, find_format

CASTABLE = tuple(name for name in DTYPES if name not in ("e8m0", "int8"))
FP8 = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")
_ROUNDED = ("tf32", "hf32")


@dataclass(frozen=True, kw_only=True)
class CastResult:
    """A converted tensor and its losses, counted as 0-dim int64 tensors on its device (nothing waits)."""

    tensor: Tensor
    overflowed: Tensor
    """Elements without a finite value in the new format: above its range, or already infinite or NaN."""
    underflowed: Tensor
    """Non-zero finite elements that became zero."""


@torch.no_grad()
def cast(tensor: Tensor, format: str, *, saturate: bool = False, flush_subnormals: bool = False) -> CastResult:
    """The tensor's values rounded to `format`, any shape, on its own device; gradients do not flow through.

    Gives `tensor`, in the dtype of the format, and the counts of elements `overflowed` and `underflowed`, 0-dim int64.
    What is above the range becomes infinite, NaN where the format has no infinity; with `saturate` the largest value.

    tf32 and hf32 give fp32 tensors whose values those formats can hold (matrix units may truncate
    where this rounds). `flush_subnormals` turns results below the smallest normal value into zero,
    for devices whose matrix units do (`Capabilities.flushes_subnormals`). `FormatError` when the
    tensor is not floating or the format cannot be reached by rounding alone (int8 needs a scale).
    """
    target = _castable(format)
    if tensor.dtype not in DTYPES.values() or not tensor.is_floating_point():
        passed = f"a tensor of {tensor.dtype} to convert to {format}"
        raise FormatError(explain(passed, ", ".join(CASTABLE), "Convert it to one of these formats first"))
    wide = tensor if tensor.dtype is torch.float64 and target.bits > FORMATS["fp32"].bits else tensor.float()
    size = wide.abs()
    overflow = _overflows(size, target)
    underflow = (tensor.float() if tensor.element_size() == 1 else tensor) != 0
    smallest = _underflow_bound(target, flush_subnormals)
    vanishes = size < smallest if flush_subnormals else size <= smallest
    underflow &= vanishes
    values = _limited(wide, overflow, target, saturate)
    if flush_subnormals:
        values = torch.where(vanishes, torch.zeros_like(values).copysign(values), values)
    return CastResult(tensor=_rounded(values, target), overflowed=overflow.sum(), underflowed=underflow.sum())


def read_fp8(raw: Tensor, stored: str, format: str, *, saturate: bool = False) -> CastResult:
    """Bytes of a stored fp8 tensor as a tensor of another format, by value.

    `raw` is uint8 of any shape and `stored` the fp8 format it was written in. The same byte means
    half the value in the fnuz kind, and 0x80 is minus zero in one kind and NaN in the other.
    """
    if raw.dtype is not torch.uint8 or stored not in FP8:
        passed = f"bytes of {raw.dtype} said to be {stored!r}"
        raise FormatError(explain(passed, f"torch.uint8, stored as {', '.join(FP8)}", "Name the format they have"))
    return cast(raw.view(torch_dtype(stored)), format, saturate=saturate)


def _castable(format: str) -> Format:
    target = find_format(format)
    if target.name not in CASTABLE:
        change = "Use one of these, or quantise with a scale"
        raise FormatError(explain(f"{format} cannot be reached by rounding alone", ", ".join(CASTABLE), change))
    return target


def _overflows(size: Tensor, target: Format) -> Tensor:
    """Where a magnitude rounds above the largest finite value, or is not finite."""
    lost = ~(size < inf)
    if target.max >= torch.finfo(size.dtype).max:
        return lost
    half_step = 2.0 ** (floor(log2(target.max)) - target.mantissa_bits - 1)
    odd = target.special != "fn"  # fp8_e4m3's largest value ends in 0, since the code above it is NaN
    above = size >= target.max + half_step if odd else size > target.max + half_step
    return lost | above


def _underflow_bound(target: Format, flush_subnormals: bool) -> float:
    """Up to here a magnitude rounds to zero; when subnormals are flushed, below here it rounds to one of them."""
    half = target.smallest_subnormal / 2
    return target.smallest_normal - half if flush_subnormals else half


def _limited(values: Tensor, overflow: Tensor, target: Format, saturate: bool) -> Tensor:
    """The values with those that overflow replaced by what the format has for them."""
    if saturate:
        limit = min(target.max, torch.finfo(values.dtype).max)  # fp64's own is no float32 number
        return values.clamp(-limit, limit)
    beyond = torch.full_like(values, inf if target.has_inf else nan).copysign(values)
    return torch.where(overflow & ~values.isnan(), beyond, values)


def _rounded(values: Tensor, target: Format) -> Tensor:
    if target.name not in _ROUNDED:
        return values.to(torch_dtype(target.name))
    return keep_mantissa(values.float(), target.mantissa_bits)
