"""Optimizer states in 8 bits: blocks of 256 values with one FP32 scale, rounded without ever standing still.

**Codes.** With top the largest magnitude of a block, a code c stands for

    moments of either sign   int8, |c| <= 127    sign(c) (|c| / 127)^2 top
    second moments           uint8, c <= 255     (c / 255)^4 top

A power puts the codes close together where the values of a block are many and small, needs no table, and is undone by
square roots, which are exact to the last bit on every device. The fourth power is the square for the root of a second
moment, which is what divides an update: both then resolve equally small parts of the largest value. A second moment
above zero never gets code 0, as the update would be divided by nothing but eps.

**Rounding.** A second moment changes by a thousandth in a step, and neighbouring codes are at least sixteen thousandths
apart. Rounded to nearest, such a moment falls only with the largest of its block, and stays up to hundreds of times
too large where gradients have become small. So a value goes to the code above where the way it has come from the one
below is more than a number in [0, 1) that depends on step and place, and on average nothing is lost. The numbers are an
additive recurrence, u = step / golden ratio + place * constant modulo 1: over steps they are spread more evenly than
random ones, cost three integer operations, and are the same on every device and after any resume.

Where a value of a block is not finite, the whole block becomes NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a scale."""
SIGNED, UNSIGNED = torch.int8, torch.uint8
"""Types of codes: of moments of either sign, and of second moments."""
LARGEST = {SIGNED: 127, UNSIGNED: 255}
BY_STEP, BY_PLACE = -1640531527, -1052792407
"""0x9E3779B9 and 0xC13FA9A9 as int32: 2**32 / 1.618..., and 2**32 / 1.3247..., of the plastic number."""
_DRAWN = 0xFFFFFF
_HALF_STEP = 0.5 / (1 << 24)
_PIECE = 1 << 20
"""Values that are encoded at once: bounds the memory of temporaries."""


class Blocks(NamedTuple):
    """A tensor's values in blocks, in the order of `flatten()`."""

    codes: Tensor
    """int8 or uint8 [n]."""
    scales: Tensor
    """fp32 [ceil(n / 256)]: the largest magnitude of each block, which may be short at the end."""


def empty_blocks(count: int, kind: torch.dtype, device: torch.device) -> Blocks:
    """Blocks of zeros. `kind` is the type of their codes."""
    return Blocks(
        torch.zeros(count, dtype=kind, device=device),
        torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=device),
    )


def part(blocks: Blocks, start: int, stop: int) -> Blocks:
    """A view of the values from `start`, a multiple of 256, up to `stop`."""
    return Blocks(blocks.codes[start:stop], blocks.scales[start // BLOCK : -(-stop // BLOCK)])


def dither(start: int, count: int, step: int | Tensor, device: torch.device) -> Tensor:
    """Numbers in (0, 1) for the values from `start` on in a step, fp32 [count].

    Args:
        start: place of the first value.
        count: how many.
        step: the number of the step, or int64 [] on the device.
        device: of the result.
    """
    place = torch.arange(start, start + count, dtype=torch.int32, device=device)
    turn = step.to(torch.int32) if isinstance(step, Tensor) else _wrapped(step)
    turned = place.mul_(BY_PLACE).add_(turn * BY_STEP if isinstance(turn, Tensor) else _wrapped(turn * BY_STEP))
    return turned.bitwise_right_shift_(8).bitwise_and_(_DRAWN).float().mul_(2.0**-24).add_(_HALF_STEP)


def _wrapped(number: int) -> int:
    """A whole number as int32 holds it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def encode(x: Tensor, kind: torch.dtype, limits: Tensor | None = None) -> Blocks:
    """Values in blocks.

    Args:
        x: fp32, contiguous.
        kind: int8, or uint8 for values that are at least zero.
        limits: of `dither`, one for each value; a value goes to the code above where it has come further than that from
            the one below. None: to the nearest.
    """
    made = empty_blocks(x.numel(), kind, x.device)
    flat = x.view(-1)
    for first in range(0, x.numel(), _PIECE):
        piece = flat[first : first + _PIECE]
        codes, scales = _encoded(piece, kind, 0.5 if limits is None else limits[first : first + _PIECE])
        target = part(made, first, first + piece.numel())
        target.codes.copy_(codes)
        target.scales.copy_(scales)
    return made


def decode(blocks: Blocks) -> Tensor:
    """The values, fp32 [n]."""
    size = _size(blocks.codes.abs() if blocks.codes.dtype is SIGNED else blocks.codes, blocks.codes.dtype)
    signed = size.copysign(blocks.codes) if blocks.codes.dtype is SIGNED else size
    full = signed.numel() // BLOCK * BLOCK
    signed[:full].view(-1, BLOCK).mul_(blocks.scales[: full // BLOCK, None])
    signed[full:].mul_(blocks.scales[full // BLOCK :])
    return signed


def _size(codes: Tensor, kind: torch.dtype) -> Tensor:
    """What codes of a magnitude stand for, in parts of the largest value; in fp32."""
    size = codes.to(torch.float32, copy=True).mul_(1 / LARGEST[kind]).square_()
    return size if kind is SIGNED else size.square_()


def _encoded(x: Tensor, kind: torch.dtype, limit: Tensor | float) -> tuple[Tensor, Tensor]:
    """Codes of some blocks, and their scales; up where the part of the way to the code above exceeds the limit."""
    size, scales = _parts(x)
    root = size.sqrt() if kind is SIGNED else size.sqrt().sqrt_()
    below = root.mul_(LARGEST[kind]).floor_()
    low, high = _size(below, kind), _size(below + 1, kind)
    up = (size - low) > limit * (high - low)
    code = below.add_(up).clamp_(0 if kind is SIGNED else 1, LARGEST[kind])
    # A conversion of NaN to a whole number is undefined. The scale says that it is one. A second moment is looked at
    # itself: its part of the largest may be zero where it is not.
    code = torch.where((size if kind is SIGNED else x) > 0, code, 0.0)
    return (code.copysign_(x) if kind is SIGNED else code).to(kind), scales


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes in parts of the largest of their block, and this, fp32 [n] and [blocks]."""
    size = x.abs()
    full = size.numel() // BLOCK * BLOCK
    tops = [size[:full].view(-1, BLOCK).amax(1)]
    if full < size.numel():
        tops.append(size[full:].amax(0, keepdim=True))
    scales = torch.cat(tops)
    scales = torch.where(scales < float("inf"), scales, float("nan"))
    divisor = torch.where(scales > 0, scales, 1.0)
    size[:full].view(-1, BLOCK).div_(divisor[: full // BLOCK, None])
    size[full:].div_(divisor[full // BLOCK :])
    return size, scales
