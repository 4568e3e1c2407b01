"""Keeps the buffers of a model and its loss, so that a skipped step leaves them as they were.

BatchNorm updates its running statistics during forward, long before it is known whether the step is
good; one non-finite batch would leave NaN in them for ever. The guard copies all buffers when a
window opens and writes the copy back where the step turns out bad: on the device, by a select on the
verdict, so that nobody waits for it.

Version counters would tell which buffers changed, but BatchNorm's kernels do not advance them, so all
are copied: a few fused copies per step. Buffers whose elements share memory (`expand`) and sparse ones
are kept as objects only, without their values: no module updates such a buffer in place.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _Kept:
    """One entry of a module's buffers when the window opened."""

    owner: nn.Module
    name: str
    buffer: Tensor | None
    value: Tensor | None
    """A copy; None where there is no value to keep."""


class _Group:
    """Buffers of one device and dtype, their saved values, and room to select between the two.

    Values and room are one flat tensor each, cut into a part per buffer, so that saving is one fused
    copy and selecting is two and a single `where`.
    """

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self.old, self.values = _flat_room(buffers)
        self.new, self.rooms = _flat_room(buffers)

    def save(self) -> None:
        torch._foreach_copy_(self.values, self.buffers)

    def write_back(self) -> None:
        torch._foreach_copy_(self.buffers, self.values)

    def select(self, bad: Tensor) -> None:
        torch._foreach_copy_(self.rooms, self.buffers)
        _where(bad, self.old, self.new, out=self.new)
        torch._foreach_copy_(self.buffers, self.rooms)


def _flat_room(buffers: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A flat tensor, and parts of it in the shapes of the buffers."""
    flat = buffers[0].new_empty(sum(buffer.numel() for buffer in buffers))
    parts = flat.split([buffer.numel() for buffer in buffers])
    return flat, [part.view(buffer.shape) for part, buffer in zip(parts, buffers, strict=True)]


class BufferGuard:
    """Snapshot of the buffers of a model, and of its loss if that is a module, and their restoration."""

    def __init__(self, model: nn.Module, loss_fn: object = None) -> None:
        own = loss_fn.modules() if isinstance(loss_fn, nn.Module) else ()
        self._modules = list(dict.fromkeys([*model.modules(), *own]))
        self._kept: list[_Kept] = []
        self._groups: list[_Group] = []
        self.more: list[Tensor] = []
        """Tensors beside the buffers that are kept like them."""
        self._stale = False
        """Whether the groups lack some of `more`."""

    def keep(self, tensors: list[Tensor]) -> None:
        """From the next snapshot on, keep these too: parameters that a forward writes like buffers."""
        known = {id(tensor) for tensor in self.more}
        self.more += [tensor for tensor in tensors if id(tensor) not in known and _has_own_values(tensor)]
        self._stale = True

    @torch.no_grad()
    def snapshot(self) -> None:
        """Remember every buffer's object and value."""
        if not self._unchanged():
            self._lay_out()
        for group in self._groups:
            group.save()

    def _lay_out(self) -> None:
        """Take up the buffers that the modules have now, with room for their values."""
        tables = [(module, module._buffers) for module in self._modules]  # noqa: SLF001
        found = [(module, name, buffer) for module, table in tables for name, buffer in table.items()]
        own = [buffer for _, _, buffer in found if buffer is not None and _has_own_values(buffer)]
        self._groups = [_Group(buffers) for buffers in _grouped([*own, *self.more])]
        self._stale = False
        rooms = {id(b): value for group in self._groups for b, value in zip(group.buffers, group.values, strict=True)}
        self._kept = [_Kept(*entry, rooms.get(id(entry[2]))) for entry in found]

    def _unchanged(self) -> bool:
        """Whether the buffers are the very objects of last time, and their values fit where those lie."""
        if self._stale or sum([len(module._buffers) for module in self._modules]) != len(self._kept):  # noqa: SLF001
            return False
        for kept in self._kept:
            buffer = kept.owner._buffers.get(kept.name)  # noqa: SLF001 - named_buffers() is 20x slower
            if buffer is not kept.buffer:
                return False
            if buffer is None:
                continue
            if _has_own_values(buffer) if kept.value is None else buffer.shape != kept.value.shape:
                return False
        return True

    def saved(self) -> dict[str, Tensor]:
        """The saved values, numbered, for a checkpoint inside an accumulation window."""
        return {str(i): kept.value for i, kept in enumerate(self._kept) if kept.value is not None}

    def load_saved(self, values: dict[str, Tensor]) -> None:
        """Replace the saved values by those of a checkpoint of the same model."""
        self.snapshot()
        for name, value in self.saved().items():
            value.copy_(values[name])

    @torch.no_grad()
    def restore(self) -> None:
        """Put every buffer back, object and value; buffers registered since are removed."""
        known = {(id(kept.owner), kept.name) for kept in self._kept}
        for module in self._modules:
            for name in [name for name in module._buffers if (id(module), name) not in known]:  # noqa: SLF001
                delattr(module, name)
        for kept in self._kept:
            kept.owner._buffers[kept.name] = kept.buffer  # noqa: SLF001
            if kept.buffer is not None and kept.value is not None and kept.buffer.shape != kept.value.shape:
                kept.buffer.resize_(kept.value.shape)
        for group in self._groups:
            group.write_back()

    @torch.no_grad()
    def restore_where(self, bad: Tensor) -> None:
        """Put every buffer back if the 0-dim tensor `bad` is not zero, without reading it.

        A buffer that a forward replaced by another tensor keeps its new object, with the old value
        where the step was bad. Where there is no old value of the same shape and dtype (a buffer
        that a first forward fills), the verdict has to be read.
        """
        if self._unchanged():
            for group in self._groups:
                group.select(bad)
            return
        pairs: Pairs = []
        selectable = sum(len(module._buffers) for module in self._modules) == len(self._kept)  # noqa: SLF001
        for kept in self._kept:
            now = kept.owner._buffers.get(kept.name)  # noqa: SLF001
            if kept.value is None:
                selectable = selectable and now is kept.buffer
            elif now is not None and _fits(now, kept):
                pairs.append((now, kept.value))
            else:
                selectable = False
        if not selectable:
            if bool(bad):
                self.restore()
            return
        for now, value in pairs:
            _where(bad, value, now, out=now)


def _has_own_values(buffer: Tensor) -> bool:
    """Whether each element has a place of its own in memory, which can be copied and written."""
    if isinstance(buffer, UninitializedBuffer) or buffer.layout != torch.strided:
        return False
    return all(stride or size <= 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _fits(buffer: Tensor, kept: _Kept) -> bool:
    """Whether the kept value can be written into `buffer`, the one of now."""
    value = kept.value
    if value is None or buffer.shape != value.shape:
        return False
    if buffer is kept.buffer:
        return True
    return buffer.dtype == value.dtype and buffer.device == value.device and _has_own_values(buffer)


def _grouped(buffers: list[Tensor]) -> list[list[Tensor]]:
    """The buffers by device and dtype: what one fused operation takes."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for buffer in buffers:
        groups[buffer.device, buffer.dtype].append(buffer)
    return list(groups.values())


def _where(bad: Tensor, old: Tensor, new: Tensor, *, out: Tensor) -> None:
    """out <- old where `bad` is not zero, else new. A select and not arithmetic: 0 * NaN is NaN."""
    out.copy_(torch.where(bad.to(new.device, non_blocking=True) != 0, old, new))
