"""`HostChunk`: parameters whose FP32 weights, gradients and AdamW states are on the host, in arenas of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.arena import Arena, allocate
from deepseek_mp.optim.offload.lanes import Lanes
from deepseek_mp.optim.offload.master_weights import Pair

States = Mapping[Any, dict[str, Any]]


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
    mark: Any = None
    """End of the copy of a gradient on its way."""
    pending: bool = False
    """Whether a gradient is on its way."""

    def accumulate(self) -> None:
        """Add the gradient that has arrived to those before."""
        self.pending, self.mark = False, None
        if self.master.grad is None:
            self.total.copy_(self.wire)
            self.master.grad = self.total
        else:
            self.master.grad.add_(self.wire.float())  # PyTorch adds mixed formats on a CPU much more slowly


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
        self._steps: dict[Slot, float | None] = {}
        self._rounded = False
        self.kept = False
        """Whether what a step changes has been copied, and the step is not known to be applied."""
        self.coming: set[Slot] = set()
        """Parameters whose gradients this backward has sent."""
        rounds = memory.cast_on_host and any(m.parameter.dtype is not torch.float32 for m in members)
        shapes = [member.parameter.shape for member in members]
        self._weights = self._allocate(torch.float32, pin=memory.pin and not rounds)
        self._moments = [self._allocate(torch.float32, pin=False) for _ in rule.MOMENTS]
        self._before = [self._allocate(torch.float32, pin=False) for _ in range(3)] if memory.undo else []
        totals = self._allocate(torch.float32, pin=False).parts(shapes)
        spares = self._allocate(torch.float32, pin=False).parts(shapes) if memory.two_gradients else totals
        before = self._before[0].parts(shapes) if self._before else [None] * len(shapes)
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
                before=before[i],
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
                slot.accumulate()

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

    def keep(self, states: States) -> None:
        """Copy what a step changes, where the chunk has memory for that."""
        for target, source in zip(self._before, [self._weights, *self._moments], strict=False):
            target.flat.copy_(source.flat)
        self._steps = {
            slot: float(states[slot.master]["step"]) if slot.master in states else None for slot in self.slots
        }
        self.kept = True

    def restore(self, states: dict[Any, dict[str, Any]]) -> None:
        """Put back what `keep` has copied."""
        for source, target in zip(self._before, [self._weights, *self._moments], strict=False):
            target.flat.copy_(source.flat)
        for slot, count in self._steps.items():
            if count is None:
                states.pop(slot.master, None)
            else:
                states[slot.master]["step"].fill_(count)
        self.kept = self._rounded = False

    def update(
        self,
        groups: Sequence[Mapping[str, Any]],
        states: dict[Any, dict[str, Any]],
        gradients: Mapping[Slot, Tensor],
        factor: Tensor | None,
    ) -> None:
        """AdamW's step on these gradients, which are multiplied by `factor` first, in a copy."""
        for index, group in enumerate(groups):
            slots = [slot for slot in gradients if slot.group == index]
            if not slots:
                continue
            for slot in slots:
                if not states.get(slot.master):
                    states[slot.master] = rule.new_state(slot.moments)
            grads = [gradients[slot] if factor is None else gradients[slot] * factor for slot in slots]
            rule.step(group, [slot.master for slot in slots], grads, [states[slot.master] for slot in slots])
        self._rounded = False

    def round(self) -> None:
        """Round the weights into the memory that they are sent from, which `freed` has made sure of."""
        for slot in self.slots:
            if slot.sending is not slot.master:
                slot.sending.copy_(slot.master)
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
        arena = allocate(self.values if values is None else values, dtype, pin=pin)
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
