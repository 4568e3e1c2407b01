"""Stochastic rounding in plain PyTorch: random numbers of a counter, and the choice between two neighbours.

The numbers are those of Philox4x32-10 ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al., SC 2011), which
Triton has too: so `triton` rounds as `reference` does, on every device, and nobody needs a generator's state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.grid import spacing
from deepseek_mp.precision import Format

WORDS = 4
"""Numbers of 32 bits that Philox makes of one counter."""
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_FACTORS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85


def uniform(seed: Tensor, rows: int, width: int) -> Tensor:
    """Random fp32 numbers [rows, width], multiples of 2**-24 in [0, 1), of a seed, int64 []; on its device.

    Four rows share a counter: that of row i and column k is (i // 4) * width + k, and its word i % 4 counts. The
    Triton kernel has these four in one thread.
    """
    assert rows % WORDS == 0
    counter = torch.arange(rows // WORDS * width, device=seed.device).view(rows // WORDS, 1, width)
    zero = torch.zeros_like(counter)
    words = philox((counter & _MASK, counter >> 32, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    return (torch.cat(words, 1).view(rows, width) >> 8).float() * 2.0**-24


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of a counter of four and a key of two; each of 32 bits, held in int64, of any shape."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        # Beyond 2**63 a product wraps around: its 64 bits are right, and all of them are used.
        first, second = a * _FACTORS[0], c * _FACTORS[1]
        a, b = ((second >> 32) & _MASK) ^ b ^ low, second & _MASK
        c, d = ((first >> 32) & _MASK) ^ d ^ high, first & _MASK
        low, high = (low + _STEPS[0]) & _MASK, (high + _STEPS[1]) & _MASK
    return a, b, c, d


def round_stochastically(x: Tensor, target: Format, uniform: Tensor) -> Tensor:
    """The value of the format just below |x| or just above, with the sign of x: above where `uniform` is less than the
    fraction of the way that |x| has come from the one to the other.

    Args:
        x: fp32 of any shape, no larger than `target.max`; NaN stays NaN.
        target: a format of at most fp32's exponent and mantissa bits.
        uniform: numbers of [0, 1), of the shape of x.

    Returns:
        fp32 numbers that the format holds, so that a cast to it changes nothing.
    """
    size = x.abs()
    step = spacing(size, target)
    # All exact: the step is a power of two, and what is left of a number beyond its whole part has fewer bits.
    steps = size / step
    below = steps.floor()
    return ((below + (uniform < steps - below)) * step).copysign(x)
