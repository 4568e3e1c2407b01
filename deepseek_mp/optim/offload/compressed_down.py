"""Gradients compressed on their way to the host, by a `Placement`: on a processor beside the device, or on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.optim.offload.compression import SMALLEST, Packed, Placement
from deepseek_mp.optim.offload.lanes import Lanes, lanes_for


@dataclass(frozen=True, eq=False, kw_only=True)
class _Compressed:
    """The mark of a gradient that waits to be expanded."""

    packed: Packed
    target: Tensor


class CompressedDown:
    """Lanes whose gradients come down in FP8, with a scale for each 128 values; weights go up as they are.

    A gradient is compressed when it is complete, and expanded when the host adds it up, in FP32. Numbers that are not
    finite become NaN, so that the step is skipped as without compression. Small tensors are copied as they are.

    Args:
        lanes: of the device.
        placement: where gradients are compressed and expanded.
    """

    def __init__(self, lanes: Lanes, placement: Placement) -> None:
        self._lanes, self._placement = lanes, placement
        self.sent_bytes = 0
        """Of compressed gradients so far."""

    def down(self, target: Tensor, source: Tensor) -> Any:
        if source.numel() < SMALLEST:
            return self._lanes.down(target, source)
        packed = self._placement.compress(source)
        self.sent_bytes += packed.nbytes
        # It comes back to the host's memory, and not to where it was.
        return _Compressed(packed=replace(packed, device=target.device, dtype=target.dtype), target=target)

    def up(self, targets: Sequence[Tensor], sources: Sequence[Tensor], *, readers: Any = None) -> Any:
        return self._lanes.up(targets, sources, readers=readers)

    def now(self) -> Any:
        return self._lanes.now()

    def wait(self, mark: Any) -> None:
        self._lanes.wait(mark)

    def land(self, mark: Any) -> None:
        if isinstance(mark, _Compressed):
            mark.target.copy_(self._placement.expand(mark.packed))
        else:
            self._lanes.land(mark)

    def has_landed(self, mark: Any) -> bool:
        return isinstance(mark, _Compressed) or self._lanes.has_landed(mark)


def compressed_gradients(
    placement: Placement, lanes: Callable[[torch.device], Lanes] = lanes_for
) -> Callable[[torch.device], Lanes]:
    """For `OffloadedOptimizer(lanes=...)`: gradients go to the host through the placement.

    Args:
        placement: where they are compressed.
        lanes: makes the lanes of a device that everything else takes.
    """
    return lambda device: CompressedDown(lanes(device), placement)
