"""`HostChunk`: parameters whose FP32 weights, gradients and AdamW states are on the host, in arenas of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.arena import Arena, HostMemory, Scratch
from deepseek_mp.optim.offload.lanes import Lanes
from deepseek_mp.optim.offload.master_weights import Pair
from deepseek_mp.optim.offload.verdict import Scaling

BLOCK = 1 << 20
"""Values that are worked on before the next ones: what is read twice, or written and read, is still in a cache then.
For up to 8 threads; more have more cache, and less to do for each call."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A parameter to be offloaded."""

    parameter: nn.Parameter
    group: int
    """Index of its group."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How the arenas of a chunk are made."""

    wire: torch.dtype | None
    """Of gradients on their way; None: BF16 for parameters in BF16, else FP32."""
    pin: bool
    undo: bool
    cast_on_host: bool
    two_gradients: bool
    """Whether the gradients of a step and those of the next exist at the same time."""
    scratch: Scratch = field(default_factory=Scratch)
    source: HostMemory = field(default_factory=HostMemory)


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

    def accumulate(self, scratch: Scratch) -> None:
        """Add the gradient that has arrived to those before."""
        self.pending, self.mark = False, None
        if self.master.grad is None:
            self.total.copy_(self.wire)
            self.master.grad = self.total
        elif self.wire.dtype is self.master.grad.dtype:
            self.master.grad.add_(self.wire)
        else:  # widened first: PyTorch adds mixed formats on a CPU much more slowly
            total, wire = self.master.grad.view(-1), self.wire.view(-1)
            for part in _blocks(total.numel()):
                total[part].add_(scratch.of(wire[part].numel()).copy_(wire[part]))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring values of one parameter."""

    slot: Slot
    part: slice
    whole: bool
    """Whether these are all of its values."""

    def of(self, tensor: Tensor) -> Tensor:
        """These values of a tensor in the shape of the parameter: as it is if they are all, else flat."""
        return tensor if self.whole else tensor.view(-1)[self.part]


@dataclass
class Kept:
    """What was copied of a parameter before its step."""

    steps: float | None
    """None: it had no state."""
    values: int = 0
    """So many, from its start."""


class HostChunk:
    """One chunk of offloaded parameters.

    Args:
        number: its place in the order of arrival.
        members: its parameters, the one whose gradient arrives first before others.
        memory: how its arenas are made.
    """

    def __init__(self, number: int, members: Sequence[Member], memory: Memory) -> None:
        self.number = number
        self.values = sum(member.parameter.numel() for member in members)
        self.arenas: list[Arena] = []
        self._uploads: list[Any] = []
        self._scratch, self._source = memory.scratch, memory.source
        self._kept: dict[Slot, Kept] = {}
        self._rounded = False
        self.kept = False
        """Whether what a step changes has been copied, and the step is not known to be applied."""
        self.coming: set[Slot] = set()
        """Parameters whose gradients this backward has sent."""
        rounds = memory.cast_on_host and any(m.parameter.dtype is not torch.float32 for m in members)
        shapes = [member.parameter.shape for member in members]
        self._weights = self._allocate(torch.float32, pin=memory.pin and not rounds)
        self._moments = [self._allocate(torch.float32, pin=False) for _ in rule.MOMENTS]
        undone = [self._allocate(torch.float32, pin=False).parts(shapes) for _ in range(3)] if memory.undo else []
        totals = self._allocate(torch.float32, pin=False).parts(shapes)
        spares = self._allocate(torch.float32, pin=False).parts(shapes) if memory.two_gradients else totals
        wires = self._by_dtype(members, [_wire(m.parameter, memory.wire) for m in members], pin=memory.pin)
        masters = [nn.Parameter(view) for view in self._weights.parts(shapes)]
        sending: Sequence[Tensor] = masters
        if rounds:
            sending = self._by_dtype(members, [m.parameter.dtype for m in members], pin=memory.pin)
        first, second = (arena.parts(shapes) for arena in self._moments)
        self.slots = [
            Slot(
                parameter=member.parameter,
                master=masters[i],
                group=member.group,
                total=totals[i],
                spare=spares[i],
                before=undone[0][i] if undone else None,
                moments_before=tuple(parts[i] for parts in undone[1:]),
                wire=wires[i],
                sending=sending[i],
                moments=(first[i], second[i]),
            )
            for i, member in enumerate(members)
        ]

    def land(self, lanes: Lanes) -> None:
        """Wait for the gradients on their way and add them."""
        for slot in self.slots:
            if slot.pending:
                lanes.land(slot.mark)
                slot.accumulate(self._scratch)

    def discard(self, lanes: Lanes) -> None:
        """Wait for the gradients on their way and forget them."""
        for slot in self.slots:
            if slot.pending:
                lanes.land(slot.mark)
                slot.pending, slot.mark = False, None

    @property
    def has_gradients(self) -> bool:
        return any(slot.master.grad is not None for slot in self.slots)

    def gradients(self) -> dict[Slot, Tensor]:
        """Those of the masters that have any, fp32."""
        return {slot: slot.master.grad for slot in self.slots if slot.master.grad is not None}

    def hand_over(self) -> dict[Slot, Tensor]:
        """The gradients, which no later one is added to; the next ones get other memory."""
        found = self.gradients()
        for slot in self.slots:
            slot.total, slot.spare, slot.master.grad = slot.spare, slot.total, None
        return found

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        states: dict[Any, dict[str, Any]],
        gradients: Mapping[Slot, Tensor],
        scaling: Scaling,
    ) -> None:
        """AdamW's step on these gradients, scaled in a copy, and the new weights rounded to what is sent.

        What a step changes is copied first, where the chunk has memory for that. All of this is done block by block.
        Memory that weights are sent from must be free, which `freed` makes sure of.
        """
        self.kept, self._rounded, self._kept = True, False, {}
        for group, pieces in _portions([slot for slot in self.slots if slot in gradients]):
            self._step(groups[group], states, [(piece, gradients[piece.slot]) for piece in pieces], scaling)
        for slot in self.slots:
            if slot not in gradients:
                _round(slot.sending, slot.master)
        self._rounded = True

    def _step(
        self,
        group: Mapping[str, Any],
        states: dict[Any, dict[str, Any]],
        pieces: Sequence[tuple[Piece, Tensor]],
        scaling: Scaling,
    ) -> None:
        for piece, _ in pieces:
            self._keep(piece, states)
        grads = [piece.of(gradient) for piece, gradient in pieces]
        if not scaling.is_one:
            room = self._scratch.of(sum(grad.numel() for grad in grads)).split([grad.numel() for grad in grads])
            grads = [scaling.into(to.view(grad.shape), grad) for to, grad in zip(room, grads, strict=True)]
        found = [_state_of(piece, states) for piece, _ in pieces]
        rule.step(group, [piece.of(piece.slot.master) for piece, _ in pieces], grads, found)
        for piece, _ in pieces:
            slot = piece.slot
            if not piece.whole and piece.part.stop == slot.master.numel():
                states[slot.master]["step"].add_(1)
            _round(piece.of(slot.sending), piece.of(slot.master))

    def _keep(self, piece: Piece, states: dict[Any, dict[str, Any]]) -> None:
        """Copy what the step of a piece will change."""
        slot = piece.slot
        if slot not in self._kept:
            self._kept[slot] = Kept(steps=float(states[slot.master]["step"]) if states.get(slot.master) else None)
            if not states.get(slot.master):
                states[slot.master] = rule.new_state(slot.moments)
        if slot.before is not None:
            for before, now in zip(
                (slot.before, *slot.moments_before), (slot.master.detach(), *slot.moments), strict=True
            ):
                piece.of(before).copy_(piece.of(now))
            self._kept[slot].values = piece.part.stop

    def base_of(self, slot: Slot) -> Tensor | None:
        """The master before the last step, if the chunk has kept it."""
        return slot.before if slot in self._kept else None

    def restore(self, states: dict[Any, dict[str, Any]]) -> None:
        """Put back what the last step has changed."""
        for slot, kept in self._kept.items():
            if slot.before is not None:
                part = slice(kept.values)
                for before, now in zip(
                    (slot.before, *slot.moments_before), (slot.master.detach(), *slot.moments), strict=True
                ):
                    now.view(-1)[part].copy_(before.view(-1)[part])
            if kept.steps is None:
                states.pop(slot.master, None)
            elif slot.master in states:
                states[slot.master]["step"].fill_(kept.steps)
        self._kept = {}
        self.kept = self._rounded = False

    def round(self) -> None:
        """Round the weights into the memory that they are sent from, which `freed` has made sure of."""
        for slot in self.slots:
            _round(slot.sending, slot.master)
        self._rounded = True

    def send(self, lanes: Lanes) -> None:
        """Send the weights to the device. The memory they are sent from is free only after `freed`."""
        if not self._rounded:
            self.freed(lanes)
            self.round()
        self._rounded = False
        targets = [slot.parameter.detach() for slot in self.slots]
        self._uploads.append(lanes.up(targets, [slot.sending.detach() for slot in self.slots]))
        for slot in self.slots:
            slot.look()

    def freed(self, lanes: Lanes) -> None:
        """Let the host wait until the weights sent last have arrived."""
        for mark in self._uploads:
            lanes.land(mark)
        self._uploads = []

    @property
    def is_complete(self) -> bool:
        """Whether this backward has sent all gradients that it can be expected to send."""
        return all(slot in self.coming for slot in self.slots if slot.parameter.requires_grad)

    @property
    def uploads(self) -> Sequence[Any]:
        """Marks of the copies that `send` began and nothing on the host has waited for."""
        return tuple(self._uploads)

    def _allocate(self, dtype: torch.dtype, *, pin: bool, values: int | None = None) -> Arena:
        arena = self._source.take(self.values if values is None else values, dtype, pin=pin)
        self.arenas.append(arena)
        return arena

    def _by_dtype(self, members: Sequence[Member], dtypes: Sequence[torch.dtype], *, pin: bool) -> list[Tensor]:
        """A view for each member, from one arena for each dtype."""
        found: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(dtypes):
            where = [index for index, own in enumerate(dtypes) if own is dtype]
            shapes = [members[index].parameter.shape for index in where]
            arena = self._allocate(dtype, pin=pin, values=sum(shape.numel() for shape in shapes))
            found |= dict(zip(where, arena.parts(shapes), strict=True))
        return [found[index] for index in range(len(members))]


def _wire(parameter: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    if wanted is not None:
        return wanted
    return torch.bfloat16 if parameter.dtype is torch.bfloat16 else torch.float32


def _block() -> int:
    return max(BLOCK, BLOCK // 8 * torch.get_num_threads())


def _blocks(values: int) -> Iterator[slice]:
    block = _block()
    return (slice(start, min(start + block, values)) for start in range(0, values, block))


def _portions(slots: Sequence[Slot]) -> Iterator[tuple[int, list[Piece]]]:
    """What is stepped by one call, with its group: a block of a large parameter, or small ones in a row."""
    small: list[Piece] = []
    filled, block = 0, _block()
    for slot in slots:
        values = slot.master.numel()
        if small and (small[0].slot.group != slot.group or filled + values > block):
            yield small[0].slot.group, small
            small, filled = [], 0
        if values > block:
            for part in _blocks(values):
                yield slot.group, [Piece(slot=slot, part=part, whole=False)]
            continue
        small.append(Piece(slot=slot, part=slice(0, values), whole=True))
        filled += values
    if small:
        yield small[0].slot.group, small


def _state_of(piece: Piece, states: Mapping[Any, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The state that a step of these values reads and writes; the counter of a part is its own, and no state's."""
    state = states[piece.slot.master]
    if piece.whole:
        return state
    return {"step": state["step"].clone(), **{name: piece.of(state[name]) for name in rule.MOMENTS}}


def _round(sending: Tensor, master: Tensor) -> None:
    if sending.data_ptr() != master.data_ptr():
        sending.copy_(master)
