"""FP32 numbers kept in BF16: rounded by chance with counted random bits, or split in a value and what it lacks.

BF16 is the upper half of FP32. Adding 16 random bits to the lower half and cutting it off rounds up with exactly the
probability of the distance from the value below, so stochastic rounding is an integer addition.

The random bits are those of Philox4x32-10 at a counter of element, step and stream, with the seed as its key. There is
no generator and no state: the same step of the same parameter has the same bits on every device, after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_mp.ops.reference.stochastic import philox

_MASK = 0xFFFFFFFF
_LOWER = 0xFFFF
"""The bits of FP32 that BF16 has not."""
_EACH = 8
"""Numbers of 16 bits in the four words of one counter."""
_IN_CACHE = 1 << 16
"""Counters that a CPU takes at once: its hundred passes over them are then not over main memory."""


def random_bits(
    sizes: Sequence[int],
    streams: Sequence[int],
    steps: Sequence[int | Tensor],
    *,
    seed: int,
    start: int = 0,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """16 random bits for each element of some tensors, drawn in one pass.

    Args:
        sizes: number of elements of each tensor.
        streams: a number of 32 bits for each tensor, its own among those of the seed.
        steps: a number of 32 bits for each tensor, or one as int64 [] on the device.
        seed: of 64 bits.
        start: place of the first element of each tensor, a multiple of 8.
        device: of the result.

    Returns:
        For each tensor int32 [size] in [0, 2**16).
    """
    counts = [-(-size // _EACH) for size in sizes]
    block = torch.cat([torch.arange(start // _EACH, start // _EACH + count, device=device) for count in counts])
    step, stream = (
        torch.cat([_repeated(number, count, device) for number, count in zip(numbers, counts, strict=True)])
        for numbers in (steps, streams)
    )
    low, high = (torch.full((), seed >> shift & _MASK, dtype=torch.int64, device=device) for shift in (0, 32))
    together = _IN_CACHE if block.device.type == "cpu" else max(block.numel(), 1)
    pieces = zip(block.split(together), step.split(together), stream.split(together), strict=True)
    words = torch.cat([
        torch.stack(philox((b & _MASK, b >> 32, t & _MASK, s & _MASK), (low, high)), 1).to(torch.int32)
        for b, t, s in pieces
    ])  # fmt: skip
    halves = words.view(torch.int16).to(torch.int32).bitwise_and_(_LOWER)
    return [part.flatten()[:size] for part, size in zip(halves.split(counts), sizes, strict=True)]


def _repeated(number: int | Tensor, count: int, device: torch.device | str | None) -> Tensor:
    if isinstance(number, Tensor):
        return number.expand(count)
    return torch.full((count,), number, dtype=torch.int64, device=device)


def round_by_bits(x: Tensor, bits: Tensor) -> Tensor:
    """FP32 numbers rounded to a BF16 neighbour, up if 16 random bits say so; unchanged where BF16 holds them.

    Args:
        x: fp32 of any shape; infinities and NaN stay.
        bits: int32 of as many elements, in [0, 2**16), in the order of `x.flatten()`.

    Returns:
        bf16, of the shape of x.
    """
    rounded = x.view(torch.int32).add(bits.view(x.shape)).bitwise_and_(~_LOWER)
    # The bits of a NaN may be carried into its sign.
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).bfloat16()


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 numbers as the nearest BF16 value and what it lacks, rounded to BF16: about 16 bits together."""
    value = x.bfloat16()
    return value, (x - value).bfloat16()


def joined(value: Tensor, compensation: Tensor) -> Tensor:
    """What was split, in FP32."""
    return value.float().add_(compensation)
