"""What the host has of parameters, and the pieces of it that a team of threads works on at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.optim.offload.arena import Scratch
from deepseek_mp.optim.offload.grad_norm import norms_of
from deepseek_mp.optim.offload.master_weights import Pair

MULTIPLE = 1024
"""Values that parts of a parameter have a multiple of: as many for each thread, in whole vectors of PyTorch's kernels,
so that each value is computed as in one piece."""


@dataclass(eq=False)
class Slot(Pair):
    """What the host has of one parameter; tensors are views of arenas, in the shape of the parameter."""

    total: Tensor
    """fp32: memory of the accumulated gradient."""
    spare: Tensor
    """fp32: memory of the next one while the host steps on this one; the same memory where that never happens."""
    wire: Tensor
    """Where gradients arrive."""
    sending: Tensor
    """What is sent up: the master, or its rounded copy."""
    moments: tuple[Tensor, Tensor]
    before: Tensor | None
    """The master before the step, where that is kept."""
    moments_before: tuple[Tensor, ...] = ()
    mark: Any = None
    """End of the copy of a gradient on its way."""
    pending: bool = False
    """Whether a gradient is on its way."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Neighbouring values of one parameter, flat; all but the slot's gradient stays where it is."""

    slot: Slot
    part: slice
    master: Tensor
    wire: Tensor
    """Where gradients arrive."""
    totals: tuple[tuple[Tensor, int, Tensor], ...]
    """Both tensors that gradients are added up in, where their memory is, and these values of it."""
    moments: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    """Memory of what a step changes; empty where that is not kept."""
    sending: Tensor | None
    """Where the master is rounded to; None where it is sent itself."""

    def of(self, tensor: Tensor) -> Tensor:
        """These values of a tensor in the shape of the parameter."""
        for whole, place, values in self.totals:  # a view takes longer to make than to find
            if tensor is whole and tensor.data_ptr() == place and tensor.is_contiguous():
                return values
        return tensor.reshape(-1)[self.part]

    def add(self, scratch: Scratch, *, first: bool) -> None:
        """Take over the gradient that has arrived, or add it to those before."""
        slot = self.slot
        total, wire = self.of(slot.total if first else _gradient(slot)), self.wire
        if first:
            total.copy_(wire)
        elif wire.dtype is total.dtype:
            total.add_(wire)
        else:  # widened first: PyTorch adds mixed formats on a CPU much more slowly
            total.add_(scratch.of(wire.numel()).copy_(wire))

    def summed(self, room: Tensor, before: Tensor | None) -> Tensor:
        """What has arrived and the gradient before, in fp32; nothing but `room` is written.

        Args:
            room: fp32, of as many values.
            before: the slot's gradient of earlier micro-batches.
        """
        wire = self.wire
        if before is None:
            return wire if wire.dtype is torch.float32 else room.copy_(wire)
        if wire.dtype is torch.float32:
            return torch.add(self.of(before), wire, out=room)
        return room.copy_(wire).add_(self.of(before))

    def norms(self, gradient: Tensor, threads: int) -> Tensor:
        """[n]: L2 norms of parts of these values of the slot's gradient."""
        return norms_of(self.of(gradient), threads)

    def keep(self) -> None:
        """Copy what a step will change."""
        if self.before:
            torch._foreach_copy_(list(self.before), [self.master, *self.moments])

    def restore(self) -> None:
        """Put back what `keep` has copied."""
        if self.before:
            torch._foreach_copy_([self.master, *self.moments], list(self.before))

    def round(self) -> None:
        """Round the weights into the memory that they are sent from."""
        if self.sending is not None:
            self.sending.copy_(self.master)


@dataclass(frozen=True)
class Block:
    """What one team steps by one call: a part of a large parameter, or small parameters of a group in a row."""

    group: int
    pieces: list[Piece]


def _gradient(slot: Slot) -> Tensor:
    assert slot.master.grad is not None
    return slot.master.grad


def blocks(slots: Sequence[Slot], most: int, teams: int = 1) -> Iterator[Block]:
    """All values of a chunk, so many in a block at most; a large parameter in as many parts for each team."""
    small: list[Piece] = []
    filled = 0
    for slot in slots:
        values = slot.master.numel()
        if small and (small[0].slot.group != slot.group or filled + values > most):
            yield Block(small[0].slot.group, small)
            small, filled = [], 0
        if values > most:
            size = _even(values, most, teams)
            for start in range(0, values, size):
                yield Block(slot.group, [_piece(slot, slice(start, min(start + size, values)))])
            continue
        small.append(_piece(slot, slice(0, values)))
        filled += values
    if small:
        yield Block(small[0].slot.group, small)


def _even(values: int, most: int, teams: int) -> int:
    """The size of parts, `most` at most, so that their number is a multiple of the teams, all but the last alike."""
    parts = -(-values // most)
    size = -(-values // (-(-parts // teams) * teams))
    return min(most, -(-size // MULTIPLE) * MULTIPLE)


def _piece(slot: Slot, part: slice) -> Piece:
    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1)[part]

    kept = () if slot.before is None else (slot.before, *slot.moments_before)
    return Piece(
        slot=slot,
        part=part,
        master=flat(slot.master),
        wire=flat(slot.wire),
        totals=tuple((whole, whole.data_ptr(), flat(whole)) for whole in (slot.total, slot.spare)),
        moments=tuple(flat(moment) for moment in slot.moments),
        before=tuple(flat(tensor) for tensor in kept),
        sending=None if slot.sending is slot.master else flat(slot.sending),
    )
