"""Seeds of stochastic rounding on a device: many by one launch, and the host waits for none."""

from __future__ import annotations

import random

import torch
from torch import Tensor

MANY = 256
"""Seeds that are made at once."""
_STRIDE = 2
"""Of 8 bytes: kernels get code of their own for a pointer that is not aligned to 16."""
_LARGEST = (1 << 63) - 1 - _STRIDE * MANY


class Seeds:
    """Numbers that follow from a generator of Python's alone, as tensors. Those made together are next to each other,
    which is all that Philox needs for other random numbers.
    """

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._left: dict[torch.device, list[Tensor]] = {}

    def next(self, device: torch.device) -> Tensor:
        """int64 [] on the device; another one with every call."""
        left = self._left.get(device)
        if not left:
            start = self._source.randint(0, _LARGEST)
            made = torch.arange(start, start + _STRIDE * MANY, device=device)[::_STRIDE]
            left = self._left[device] = list(made.unbind())
        return left.pop()
