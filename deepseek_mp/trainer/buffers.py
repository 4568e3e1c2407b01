"""Keeps a model's buffers, so that a skipped step leaves them as they were.

BatchNorm updates its running statistics during forward, long before it is known whether the step is
good; one non-finite batch would leave NaN in them for ever. The guard copies all buffers when a
window opens and writes the copy back where the step turns out bad: on the device, by a select on the
verdict, so that nobody waits for it.

Version counters would tell which buffers changed, but BatchNorm's kernels do not advance them, so all
are copied: a few fused copies per step.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer


class BufferGuard:
    """Snapshot of the buffers of a model, and their restoration."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        """(owner, name, the buffer object, its saved value)"""

    @torch.no_grad()
    def snapshot(self) -> None:
        """Remember every buffer's object and value."""
        current = [
            (module, name, buffer)
            for module in self._modules
            for name, buffer in module._buffers.items()  # noqa: SLF001 - named_buffers() is 20x slower
            if buffer is not None and not isinstance(buffer, UninitializedBuffer)
        ]
        if self._fits(current):
            saved = [kept[3] for kept in self._kept]
        else:
            saved = [torch.empty_like(buffer) for _, _, buffer in current]
        _copy(saved, [buffer for _, _, buffer in current])
        self._kept = [(*entry, value) for entry, value in zip(current, saved, strict=True)]

    def saved(self) -> dict[str, Tensor]:
        """The saved values, numbered, for a checkpoint inside an accumulation window."""
        return {str(i): kept[3] for i, kept in enumerate(self._kept)}

    def load_saved(self, values: dict[str, Tensor]) -> None:
        """Replace the saved values by those of a checkpoint of the same model."""
        self.snapshot()
        _copy([kept[3] for kept in self._kept], [values[str(i)] for i in range(len(self._kept))])

    def _fits(self, current: list[tuple[nn.Module, str, Tensor]]) -> bool:
        """Whether the values saved last time can be overwritten with these buffers."""
        return len(current) == len(self._kept) and all(
            kept[3].shape == buffer.shape and kept[3].dtype == buffer.dtype and kept[3].device == buffer.device
            for kept, (_, _, buffer) in zip(self._kept, current, strict=True)
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Put every buffer back, object and value."""
        for module, name, buffer, _ in self._kept:
            module._buffers[name] = buffer  # noqa: SLF001
        _copy([kept[2] for kept in self._kept], [kept[3] for kept in self._kept])

    @torch.no_grad()
    def restore_where(self, bad: Tensor) -> None:
        """Put every buffer back if the 0-dim tensor `bad` is not zero, without reading it.

        A buffer that a forward replaced by another tensor keeps its new object, with the old value
        where the step was bad. If its shape changed, the verdict has to be read.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for module, name, buffer, value in self._kept:
            now = module._buffers.get(name)  # noqa: SLF001
            if now is None or now.shape != value.shape or now.dtype != value.dtype:
                if bool(bad):
                    self.restore()
                    return
                continue
            groups[now.device, now.dtype].append((now if now is not buffer else buffer, value))
        for (device, _), pairs in groups.items():
            _select(pairs, bad.to(device, non_blocking=True) != 0)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        pair = groups[target.device, target.dtype]
        pair[0].append(target)
        pair[1].append(source.detach())
    for into, out_of in groups.values():
        torch._foreach_copy_(into, out_of)


def _select(pairs: list[tuple[Tensor, Tensor]], bad: Tensor) -> None:
    """now <- where(bad, value, now) for tensors of one device and dtype, in a handful of kernels."""
    flat_now = torch.cat([now.detach().reshape(-1) for now, _ in pairs])
    flat_old = torch.cat([value.reshape(-1) for _, value in pairs])
    chosen = torch.where(bad, flat_old, flat_now).split([now.numel() for now, _ in pairs])
    torch._foreach_copy_(
        [now.detach() for now, _ in pairs], [part.view(now.shape) for part, (now, _) in zip(chosen, pairs, strict=True)]
    )
