"""How many values of a tensor are infinite or NaN: counted on the device, in little memory, without waiting.

By Triton it is one pass and one launch. PyTorch looks at pieces, one after the other, since what it computes of a whole
tensor would be as large: where every operation passes through Python, as on a counted step, those of the pieces of
large activations take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from deepseek_mp.ops.capturing import is_capturing
from deepseek_mp.ops.choose import has_kernels, kernel_runs, non_finite_of


class Bits(NamedTuple):
    """A value is infinite or NaN if and only if those of its bits that are in `mask` are `pattern`."""

    dtype: torch.dtype
    """Integers that the values are read as."""
    mask: int
    pattern: int


def _of_exponent(dtype: torch.dtype, exponent: int) -> Bits:
    """As IEEE has it: all bits of the exponent are ones."""
    return Bits(dtype, exponent, exponent)


BITS: Mapping[torch.dtype, Bits] = MappingProxyType(
    {
        torch.float64: _of_exponent(torch.int64, 0x7FF0_0000_0000_0000),
        torch.float32: _of_exponent(torch.int32, 0x7F80_0000),
        torch.bfloat16: _of_exponent(torch.int16, 0x7F80),
        torch.float16: _of_exponent(torch.int16, 0x7C00),
        torch.float8_e5m2: _of_exponent(torch.uint8, 0x7C),
        torch.float8_e4m3fn: Bits(torch.uint8, 0x7F, 0x7F),
        torch.float8_e4m3fnuz: Bits(torch.uint8, 0xFF, 0x80),
        torch.float8_e5m2fnuz: Bits(torch.uint8, 0xFF, 0x80),
        torch.float8_e8m0fnu: Bits(torch.uint8, 0xFF, 0xFF),
    }
)
"""Of types that the kernel reads; the last four have NaN and no infinities. Zero is finite in all of them."""


def non_finite(x: Tensor) -> Tensor:
    """How many values of x are infinite or NaN, fp32 [] on the device of x; exact up to 2^24 of them.

    Args:
        x: strided, floating or complex, of any shape and type but `float4_e2m1fn_x2`, which PyTorch does not convert. A
            complex number is one value. The kernel reads tensors without gaps and overlaps, in whatever order their
            dimensions lie; others, complex ones and what is not PyTorch's own kind of tensor are looked at in pieces.
    """
    return non_finite_of("triton" if _by_kernel(x) else "reference")(x)


def _by_kernel(x: Tensor) -> bool:
    """Whether the kernel reads it here and now; asked in an order in which nothing is tried where it must not be."""
    if not has_kernels(x.device) or type(x) not in (Tensor, nn.Parameter) or x.dtype not in BITS:
        return False
    # Nothing runs while code is traced, a tensor in a transform of `torch.func` has no memory of its own, and what
    # lies in that of a negation that was put off is not its values.
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None or x.is_neg():
        return False
    return is_gapless(x) and not is_capturing(x.device) and _kernel_runs(x.device)


def is_gapless(x: Tensor) -> bool:
    """Whether the values of x fill one stretch of memory, each once, in whatever order the dimensions lie."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


@cache
def _kernel_runs(device: torch.device) -> bool:
    def once() -> None:
        non_finite_of("triton")(torch.ones(1, device=device))

    return kernel_runs(device, "counting values that are not finite", once)
