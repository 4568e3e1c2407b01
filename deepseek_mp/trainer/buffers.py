"""Keeps a model's buffers, so that a skipped step leaves them as they were.

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


class BufferGuard:
    """Snapshot of the buffers of a model, and their restoration."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._kept: list[_Kept] = []
        self._groups: list[tuple[list[Tensor], list[Tensor]]] = []
        """(buffers, their saved values) of one device and dtype: what a fused copy takes."""

    @torch.no_grad()
    def snapshot(self) -> None:
        """Remember every buffer's object and value."""
        found = [
            (module, name, buffer)
            for module in self._modules
            for name, buffer in module._buffers.items()  # noqa: SLF001 - named_buffers() is 20x slower
        ]
        if not self._same(found):
            self._kept = [_Kept(*entry, _room_for(entry[2])) for entry in found]
            pairs = [(k.buffer, k.value) for k in self._kept if k.buffer is not None and k.value is not None]
            self._groups = [_transposed(group) for group in _grouped(pairs)]
        for buffers, values in self._groups:
            torch._foreach_copy_(values, buffers)

    def _same(self, found: list[tuple[nn.Module, str, Tensor | None]]) -> bool:
        """Whether the buffers are the very objects of last time, and their values fit where those lie."""
        if len(found) != len(self._kept):
            return False
        for (_, _, buffer), kept in zip(found, self._kept, strict=True):
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
        for buffers, values in self._groups:
            torch._foreach_copy_(buffers, values)

    @torch.no_grad()
    def restore_where(self, bad: Tensor) -> None:
        """Put every buffer back if the 0-dim tensor `bad` is not zero, without reading it.

        A buffer that a forward replaced by another tensor keeps its new object, with the old value
        where the step was bad. Where there is no old value of the same shape and dtype (a buffer
        that a first forward fills), the verdict has to be read.
        """
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
        for group in _grouped(pairs):
            _select(group, bad.to(group[0][0].device, non_blocking=True) != 0)


def _room_for(buffer: Tensor | None) -> Tensor | None:
    """Where the buffer's value can be kept, if it has one that can be written back."""
    return torch.empty_like(buffer) if buffer is not None and _has_own_values(buffer) else None


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


def _grouped(pairs: Pairs) -> list[Pairs]:
    """The pairs by device and dtype of the buffer: what one fused operation takes."""
    groups: dict[tuple[torch.device, torch.dtype], Pairs] = defaultdict(list)
    for pair in pairs:
        groups[pair[0].device, pair[0].dtype].append(pair)
    return list(groups.values())


def _transposed(pairs: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _select(pairs: Pairs, bad: Tensor) -> None:
    """now <- where(bad, value, now) for tensors of one device and dtype, in a handful of kernels."""
    flat_now = torch.cat([now.detach().reshape(-1) for now, _ in pairs])
    flat_old = torch.cat([value.reshape(-1) for _, value in pairs])
    chosen = torch.where(bad, flat_old, flat_now).split([now.numel() for now, _ in pairs])
    torch._foreach_copy_(
        [now.detach() for now, _ in pairs], [part.view(now.shape) for part, (now, _) in zip(chosen, pairs, strict=True)]
    )
