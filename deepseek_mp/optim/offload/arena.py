"""Host memory that is allocated once and shared out, since fresh pages cost more than writing to them.

Pinned where it is copied from and to, so that copies run beside the device's work.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
"""Bytes. Large blocks begin at a multiple of it, so that values of one parameter are equally far from it in all blocks.
What the system gives by itself are distances of a page or a few, at which loads and stores of AMD's processors collide:
the host's step takes up to twice as long then."""


VIEWS = 256
"""Of a thread's scratch memory at most that are kept; a window may step any of many small parameters."""


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


class Scratch(threading.local):
    """Memory for what is needed for a moment only, one block for each thread."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)
        self._parts: dict[int, Tensor] = {}

    def of(self, values: int) -> Tensor:
        """fp32 [values], of any content, until the thread asks again."""
        part = self._parts.get(values)
        if part is None:
            if self._flat.numel() < values:
                self._flat, self._parts = torch.empty(values), {}
            elif len(self._parts) >= VIEWS:
                self._parts = {}
            part = self._parts[values] = self._flat[:values]
        return part


class HostMemory:
    """Where the arenas of an optimizer come from; those that are given back are handed out again.

    Fresh memory costs more than a step: each page is found at its first use, and pinned memory is locked page by page.
    So whoever makes one optimizer after the other passes the same `HostMemory` to all of them, and closes each before
    the next one is made.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype, bool], list[Arena]] = {}

    def take(self, values: int, dtype: torch.dtype, *, pin: bool) -> Arena:
        """As `allocate`, from what was given back if there is such a block."""
        known = self._free.get((values, dtype, pin))
        if not known:
            return allocate(values, dtype, pin=pin)
        arena = known.pop()
        arena.flat.zero_()
        return arena

    def give_back(self, arenas: Sequence[Arena]) -> None:
        """Nobody reads or writes these any more."""
        for arena in arenas:
            wanted = arena.pinned or arena.refused is not None
            self._free.setdefault((arena.flat.numel(), arena.flat.dtype, wanted), []).append(arena)

    @property
    def free_bytes(self) -> int:
        """Of the blocks that wait to be handed out."""
        return sum(arena.flat.nbytes for arenas in self._free.values() for arena in arenas)


def allocate(values: int, dtype: torch.dtype, *, pin: bool) -> Arena:
    """A block of zeros; pageable memory where pinned memory cannot be had, which the arena then says."""
    refused = None
    if pin:
        try:
            return Arena(_pinned(values, dtype).zero_(), pinned=True, refused=None)
        except (RuntimeError, MemoryError) as error:  # no driver for it, or the system's limit of locked memory
            refused = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Arena(_pageable(values, dtype), pinned=False, refused=refused)


def _pageable(values: int, dtype: torch.dtype) -> Tensor:
    """Zeros, in huge pages where the system has them: fewer addresses to look up."""
    size = values * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(values, dtype=dtype)
    room = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            room.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(room, dtype=dtype, count=values, offset=start)


def _pinned(values: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(values, dtype=dtype, pin_memory=True)


def _views(flat: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
    start = 0
    for shape in shapes:
        yield flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
