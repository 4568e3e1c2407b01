"""Where many parameters of one device lie, as tables on it: one kernel then steps all of them.

A table is made once and compared with what it should be before each use, number by number: a parameter that was moved,
stored otherwise or left out makes a new one. Gradients, which many loops allocate anew for each step, have a table of
their own. Both are sent from pinned memory, so that nothing waits for the device, and are never overwritten: what was
sent before stays with the work that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import or_

import torch
from torch import Tensor

from deepseek_mp.ops.block_states import BLOCK

ROWS = 4
"""Blocks of a program, so that each of its 128 threads has eight values. Not measured."""
WIDTH = 12
"""Columns: those of `Lines`, with the first program after the count, and codes and scales of up to two moments."""
_HOST = torch.device("cpu")
"""Said each time: a user may have set another default."""
_ALIGNMENT = 16
"""Bytes of the widest access of a thread, and values from which on a mask does not cut one apart."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What a table says of n parameters; each a list of n numbers, pointers as addresses."""

    weights: list[int]
    compensations: list[int]
    """Zeros where there are none."""
    counts: list[int]
    """Values of each."""
    streams: list[int]
    channels: list[int]
    """Of parameters that lie in channels_last: the size of their second dimension. Else anything."""
    pixels: list[int]
    """Of such: the product of the sizes after the second."""
    numbers: list[int]
    """The place of each in vectors of numbers."""
    moments: Sequence[list[int]]
    """The codes and the scales of each moment in turn; or a moment in fp32, and zeros."""


class PointerTable:
    """The tables of some parameters, empty at first.

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: Lines | None = None
        self._known_grads: list[int] = []
        self._lines_aligned = self._grads_aligned = False
        self.lines = self.owners = self.grads = torch.empty(0, dtype=torch.int64, device=_HOST)

    @property
    def programs(self) -> int:
        """How many a kernel has, each for `ROWS` blocks of one parameter."""
        return len(self.owners)

    @property
    def aligned(self) -> bool:
        """Whether everything begins at a multiple of 16 bytes and has a multiple of 16 values."""
        return self._lines_aligned and self._grads_aligned

    def refresh(self, lines: Lines, grads: list[int]) -> None:
        """Make the tables say this, if they do not.

        Args:
            lines: of n parameters, at least one.
            grads: addresses of their gradients.
        """
        if lines != self._known:
            self._known = lines
            self._make(lines)
        if grads != self._known_grads:
            self._known_grads = grads
            self._grads_aligned = _aligned(grads)
            self.grads = sent(torch.tensor(grads, dtype=torch.int64, device=_HOST), self._device)

    def _make(self, lines: Lines) -> None:
        programs = [-(-count // (BLOCK * ROWS)) for count in lines.counts]
        first = [0, *accumulate(programs)][:-1]
        laid = [lines.streams, lines.channels, lines.pixels, lines.numbers]
        columns = [lines.weights, lines.compensations, lines.counts, first, *laid, *lines.moments]
        whole = torch.zeros(len(first), WIDTH, dtype=torch.int64, device=_HOST)
        whole[:, : len(columns)] = torch.tensor(columns, device=_HOST).t()
        owners = torch.arange(len(first), dtype=torch.int32, device=_HOST)
        owners = owners.repeat_interleave(torch.tensor(programs, device=_HOST))
        self.lines, self.owners = sent(whole, self._device), sent(owners, self._device)
        addresses = [lines.weights, lines.compensations, lines.counts, *lines.moments]
        self._lines_aligned = all(map(_aligned, addresses))


def sent(made: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting; the allocator keeps the copy of it until it has been read."""
    if made.device == device:
        return made
    ready = made if device.type == "mps" else made.pin_memory()  # mps has no pinned host memory
    return ready.to(device, non_blocking=True)


def _aligned(numbers: list[int]) -> bool:
    return reduce(or_, numbers, 0) % _ALIGNMENT == 0
