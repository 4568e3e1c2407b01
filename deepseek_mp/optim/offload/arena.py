"""Host memory that is allocated once and shared out: pinned, so that copies run beside the device's work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Arena:
    """One block of memory."""

    flat: Tensor
    """[values], on the host."""
    pinned: bool
    refused: str | None
    """Why the memory is pageable though pinned memory was asked for."""

    def parts(self, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Views of these shapes, one behind the other."""
        return list(_views(self.flat, shapes))


def allocate(values: int, dtype: torch.dtype, *, pin: bool) -> Arena:
    """A block of zeros; pageable memory where pinned memory cannot be had, which the arena then says."""
    refused = None
    if pin:
        try:
            return Arena(_pinned(values, dtype).zero_(), pinned=True, refused=None)
        except (RuntimeError, MemoryError) as error:  # no driver for it, or the system's limit of locked memory
            refused = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Arena(torch.zeros(values, dtype=dtype), pinned=False, refused=refused)


def _pinned(values: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(values, dtype=dtype, pin_memory=True)


def _views(flat: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
    start = 0
    for shape in shapes:
        yield flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
