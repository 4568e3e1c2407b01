"""Saved tensors brought into a smaller form: FP8 by the casts of `ops`, or bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from deepseek_mp.activations.operations import NOT_POSITIVE_IF_STOPPED
from deepseek_mp.activations.stored import Bits, Geometry, Rounded
from deepseek_mp.backends import capabilities
from deepseek_mp.ops.choose import choose
from deepseek_mp.ops.schema import padded_rows, quantise

FORMAT = "fp8_e4m3"
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
"""What the casts take."""


def is_dense(x: Tensor) -> bool:
    """Whether the values of a strided tensor fill a piece of memory without gaps, each once."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


@torch.no_grad()
def rounded(x: Tensor, group: int, seed: int | None) -> Rounded:
    """A dense tensor in FP8, by groups in the order of memory.

    Args:
        x: fp32, bf16 or fp16, of any shape, dense.
        group: values that share a scale, 32 or 128.
        seed: of stochastic rounding; None: to the nearest.
    """
    flat = _in_memory(x)
    whole = flat.numel() // group * group
    granularity = f"1x{group}"
    number = None if seed is None else torch.full((), seed, dtype=torch.int64, device=x.device)
    implementation = _implementation(x.device, granularity)
    values, scale, _, _ = quantise(
        flat[:whole].view(-1, group), FORMAT, granularity, False, True, False, implementation, seed=number
    )
    return Rounded(values, scale, flat[whole:].clone(), Geometry.of(x))


def rounded_bytes(count: int, group: int) -> int:
    """Bytes that `rounded` takes for so many values, nearly: rows are added up to whole tiles of the cast."""
    return padded_rows(count // group, f"1x{group}") * (group + 4)


@torch.no_grad()
def signs(x: Tensor, operation: str) -> Bits:
    """Which values an operation's backward lets through: all that `operations.reads_sign` says it reads of x."""
    flat = _in_memory(x)
    # The comparisons of the backwards, so that NaN goes the same way.
    mask = ~(flat <= 0) if operation in NOT_POSITIVE_IF_STOPPED else flat > 0
    return Bits(mask, Geometry.of(x))


@torch.no_grad()
def two_valued(x: Tensor) -> Bits | None:
    """A dense floating tensor of zeros and one positive number, exactly; None if it has other values.

    The host waits for the answer.
    """
    flat = _in_memory(x)
    one = flat.amax()
    mask = flat == one
    return Bits(mask, Geometry.of(x), one) if bool(((flat == 0) | mask).all()) and bool(one > 0) else None


@torch.no_grad()
def mask_bits(x: Tensor) -> Bits:
    """A dense bool tensor."""
    return Bits(_in_memory(x), Geometry.of(x))


def _in_memory(x: Tensor) -> Tensor:
    """The values of a dense tensor in the order of memory, [n]; a view."""
    return x.detach().as_strided((x.numel(),), (1,))


@cache
def _implementation(device: torch.device, granularity: str) -> str:
    return choose("quantise", [granularity], capabilities(device))
