"""`HostChunk`: parameters whose FP32 weights, gradients and AdamW states are on the host, in arenas of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.arena import Arena, HostMemory, Scratch
from deepseek_mp.optim.offload.crew import Crew, Job
from deepseek_mp.optim.offload.grad_norm import Landed
from deepseek_mp.optim.offload.in_turn import UnderWay
from deepseek_mp.optim.offload.lanes import Lanes
from deepseek_mp.optim.offload.pieces import Block, Piece, Slot, blocks
from deepseek_mp.optim.offload.verdict import Scaling

BLOCK = 1 << 18
"""Values for each thread of a team, which works on them before it takes the next ones: many for each call, and still
shared out evenly. A multiple of `pieces.MULTIPLE`."""


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
    crew: Crew = field(default_factory=Crew)
    """Does the work of all chunks."""
    source: HostMemory = field(default_factory=HostMemory)


@dataclass(frozen=True)
class Given:
    """What a step is made on."""

    gradients: Mapping[Slot, Tensor]
    arrived: frozenset[Slot]
    scaling: Scaling

    def of(self, piece: Piece, room: Tensor) -> Tensor:
        """The gradient of a piece, scaled; `room` has its size and may be written."""
        before = self.gradients.get(piece.slot)
        if piece.slot in self.arrived:
            gradient = piece.summed(room, before)
        else:
            assert before is not None, "what is stepped has a gradient"
            gradient = piece.of(before)
        return gradient if self.scaling.is_one else self.scaling.into(room, gradient)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The gradients of a window that a step was given."""

    added: Mapping[Slot, Tensor]
    """fp32: those that are added up."""
    coming: Mapping[Slot, Any]
    """The ends of the copies of those on their way."""


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
        self._scratch, self._source, self._crew = memory.scratch, memory.source, memory.crew
        self._steps_before: dict[Slot, float | None] = {}
        """Of those that the last step changes; None: there was no state."""
        self._changed: list[Piece] = []
        """By the last step, all or in part."""
        self._ahead: Job | None = None
        """Copies what a step will change before it is known to come."""
        self._ahead_of: tuple[int, ...] = ()
        """Versions of what that copies."""
        self._has_copy: set[Piece] = set()
        self._added: set[Piece] = set()
        """Pieces of gradients on their way that a landing has added up which has failed, or was interrupted."""
        self._landed: dict[Slot, Landed] = {}
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
        self._blocks = list(blocks(self.slots, BLOCK * self._crew.width, self._crew.teams))
        self._pieces: dict[Slot, list[Piece]] = {slot: [] for slot in self.slots}
        for block in self._blocks:
            for piece in block.pieces:
                self._pieces[piece.slot].append(piece)

    def land(self, lanes: Lanes, *, measure: bool = False) -> None:
        """Wait for the gradients on their way and add them; after one that failed this goes on where that was.

        Args:
            lanes: that they come by.
            measure: take their norms, too, while they are in a cache.
        """
        arrived = [slot for slot in self.slots if slot.pending]
        for slot in arrived:
            lanes.land(slot.mark)
            if slot.master.grad is not None and not slot.master.grad.is_contiguous():  # another one was put there
                slot.master.grad = slot.master.grad.contiguous()
        first = {slot for slot in arrived if slot.master.grad is None}
        for slot in first:
            if not slot.total.is_contiguous():  # through `data`
                slot.total = slot.total.contiguous()
        norms: dict[Piece, Tensor] = {}

        def add(block: Block) -> None:
            for piece in block.pieces:
                if piece.slot.pending:
                    self._add(piece, first=piece.slot in first)
                    if measure:
                        norms[piece] = piece.norms(piece.slot.total, self._crew.width)

        self._crew.run([partial(add, block) for block in self._blocks] if arrived else [])
        for slot in arrived:
            if slot in first:
                slot.master.grad = slot.total
            if measure:
                self._landed[slot] = Landed.of(slot.total, [norms[p] for p in self._pieces[slot]])
        self._used(arrived)  # last, so that an interrupt loses nothing

    def _add(self, piece: Piece, *, first: bool) -> None:
        """Once, whoever tries again."""
        if piece in self._added:
            return
        target = piece.slot.total if first else piece.slot.master.grad
        before = None if target is None else target._version
        try:
            piece.add(self._scratch, first=first)
        except Exception:
            raise  # the addition comes last, and has not been made
        except BaseException:  # an interrupt, which no thread of a crew meets: so nobody else writes here
            if target is not None and target._version != before:
                self._added.add(piece)
            raise
        self._added.add(piece)

    def norms(self) -> list[Tensor]:
        """L2 norms, [n] each, of parts that are all of the gradients; those that were taken when they landed."""
        gradients = self.gradients()
        known = {slot: self._landed[slot] for slot, own in gradients.items() if self._is_as_landed(slot, own)}
        others = [piece for slot in gradients if slot not in known for piece in self._pieces[slot]]
        found: dict[Piece, Tensor] = {}

        def take(piece: Piece) -> None:
            found[piece] = piece.norms(gradients[piece.slot], self._crew.width)

        self._crew.run([partial(take, piece) for piece in others])
        return [norm for landed in known.values() for norm in landed.norms] + [found[piece] for piece in others]

    def _is_as_landed(self, slot: Slot, gradient: Tensor) -> bool:
        return slot in self._landed and self._landed[slot].still(gradient)

    def discard(self, lanes: Lanes) -> None:
        """Wait for the gradients on their way and forget them."""
        for slot in self.slots:
            if slot.pending:
                lanes.land(slot.mark)
        self._used(self.slots)

    def _used(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            slot.pending, slot.mark = False, None
        self._added = set()

    @property
    def is_pending(self) -> bool:
        """Whether gradients are on their way, or have arrived and are not added up."""
        return any(slot.pending for slot in self.slots)

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

    def take(self, lanes: Lanes) -> Taken:
        """The gradients, for a step beside what comes next; those on their way are neither waited for nor added up.

        The chunk has none then. Before that step has ended, no others may come.
        """
        if self._added:
            self.land(lanes)
        found = Taken(added=self.gradients(), coming={slot: slot.mark for slot in self.slots if slot.pending})
        self._used(self.slots)
        for slot in self.slots:
            slot.master.grad = None
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
        self.begin(groups, states, gradients, scaling).end()

    def begin(
        self,
        groups: Sequence[Mapping[str, Any]],
        states: dict[Any, dict[str, Any]],
        gradients: Mapping[Slot, Tensor],
        scaling: Scaling,
        *,
        arrived: frozenset[Slot] = frozenset(),
    ) -> UnderWay:
        """Begin what `step` does; to the gradients of slots that have `arrived`, those are added on the way."""
        stepped = {slot for slot in self.slots if slot in gradients or slot in arrived}
        self._steps_before = {slot: self._state(slot, states) for slot in self.slots if slot in stepped}
        # All blocks of a parameter read one counter; what a block does in Python keeps the other teams from theirs.
        counters = {slot: states[slot.master]["step"] + 1 for slot in self._steps_before}
        self.rest()
        self.kept, self._rounded, self._changed = True, False, []

        def step(block: Block) -> None:
            pieces = [piece for piece in block.pieces if piece.slot in stepped]
            if pieces:
                self._step(groups[block.group], counters, pieces, Given(gradients, arrived, scaling))
            for piece in block.pieces:
                piece.round()

        job = self._crew.begin([partial(step, block) for block in self._blocks])
        return UnderWay(job, partial(self._stepped, states))

    def begin_taken(
        self,
        groups: Sequence[Mapping[str, Any]],
        states: dict[Any, dict[str, Any]],
        taken: Taken,
        scaling: Scaling,
        lanes: Lanes,
    ) -> UnderWay:
        """Begin to step on what was taken, once all of it has arrived."""
        for mark in taken.coming.values():
            lanes.land(mark)
        return self.begin(groups, states, taken.added, scaling, arrived=frozenset(taken.coming))

    def _stepped(self, states: Mapping[Any, Mapping[str, Tensor]]) -> None:
        """Count the step, by the first piece of each parameter."""
        for piece in self._changed:
            if piece.part.start == 0:
                states[piece.slot.master]["step"].add_(1)
        self._rounded, self._has_copy = True, set()

    def keep_ahead(self) -> Job:
        """Copy what the next step will change, while the crew has nothing else to do; `rest` ends that early.

        Writes that PyTorch counts are found, and the step copies again what they may have changed.
        """
        self.rest()
        self._has_copy, self._ahead_of = set(), self._versions()

        def keep(block: Block) -> None:
            for piece in block.pieces:
                piece.keep()
                self._has_copy.add(piece)

        self._ahead = self._crew.begin([partial(keep, block) for block in self._blocks], beside=True)
        return self._ahead

    def rest(self) -> None:
        """Nothing of this chunk is copied ahead from now on; what was copied counts if it is still the same."""
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead = None
        if self._ahead_of != self._versions():
            self._has_copy = set()

    def _versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for slot in self.slots for tensor in (slot.master, *slot.moments))

    def _step(
        self,
        group: Mapping[str, Any],
        counters: Mapping[Slot, Tensor],
        pieces: Sequence[Piece],
        given: Given,
    ) -> None:
        for piece in pieces:
            if piece not in self._has_copy:
                piece.keep()
            self._changed.append(piece)
        sizes = [piece.master.numel() for piece in pieces]
        room = self._scratch.of(sum(sizes))
        rooms = room.split(sizes) if len(sizes) > 1 else [room]
        grads = [given.of(piece, to) for piece, to in zip(pieces, rooms, strict=True)]
        masters, moments = [piece.master for piece in pieces], [piece.moments for piece in pieces]
        rule.step(group, masters, grads, moments, [counters[piece.slot] for piece in pieces])

    def _state(self, slot: Slot, states: dict[Any, dict[str, Any]]) -> float | None:
        """Its steps so far; makes the state of a parameter that has none."""
        state = states.get(slot.master)
        if state:
            for name, moment in zip(rule.MOMENTS, slot.moments, strict=True):
                if state[name].data_ptr() != moment.data_ptr():  # somebody has put another one there
                    state[name] = moment.copy_(state[name])
            return float(state["step"])
        states[slot.master] = rule.new_state(slot.moments)
        return None

    def base_of(self, slot: Slot) -> Tensor | None:
        """The master before the last step, if the chunk has kept it."""
        return slot.before if slot in self._steps_before else None

    def restore(self, states: dict[Any, dict[str, Any]]) -> None:
        """Put back what the last step has changed; its job has ended."""
        self._crew.run([piece.restore for piece in self._changed])
        for slot, steps in self._steps_before.items():
            if steps is None:
                states.pop(slot.master, None)
            elif slot.master in states:
                states[slot.master]["step"].fill_(steps)
        self._has_copy, self._ahead_of = set(self._changed), self._versions()  # the copies are those of the next step
        self._steps_before, self._changed = {}, []
        self.kept = self._rounded = False

    def round(self) -> None:
        """Round the weights into the memory that they are sent from, which `freed` has made sure of."""
        # Nobody is woken for weights that are sent as they are: that may take as long as sending them.
        self._crew.run([p.round for block in self._blocks for p in block.pieces if p.sending is not None])
        self._rounded = True

    def send(self, lanes: Lanes, *, readers: Any = None) -> None:
        """Send the weights to the device. The memory they are sent from is free only after `freed`.

        Args:
            lanes: that they go by.
            readers: of the weights that they replace, as for `Lanes.up`.
        """
        if not self._rounded:
            self.freed(lanes)
            self.round()
        self._rounded = False
        targets = [slot.parameter.detach() for slot in self.slots]
        self._uploads.append(lanes.up(targets, [slot.sending.detach() for slot in self.slots], readers=readers))
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
