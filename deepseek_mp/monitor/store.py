"""The statistics of all layers in one FP32 buffer on the device, of a size that does not change, and its copies.

Parts of the buffer, with U layers, W ways of rounding and M modules:

    last, mean, first   [U, 4, 1 + W, 6]   of each layer's input, weight, grad_output and update
    count               [U, 4]             samples of each
    bad                 [M, 4]             non-finite values in each module's input, output, grad_output and weight
    produced            [M, 2]             sampled steps in which the module made the first of them: forward, backward
    origin              [2, 3]             step, module and phase of the first producer ever, and of the latest sampled
                                           step; -1 where there was none

`mean` is an exponential mean that begins at zero: x of each sample adds (1 - d) x to d times what was there, so that
after n samples it is too small by the factor 1 - d^n, which `corrected` takes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.monitor.measure import WIDTH

TENSORS = ("input", "weight", "grad_output", "update")
"""The three operands in the order of `Operand`, and what the optimizer did."""
UPDATE = TENSORS.index("update")
SEEN = ("input", "output", "grad_output", "weight")
"""Where non-finite values are counted."""
PHASES = ("forward", "backward")
NOWHERE = -1.0


@dataclass(frozen=True)
class Parts:
    """The buffer's parts, as views of it."""

    last: Tensor
    mean: Tensor
    first: Tensor
    count: Tensor
    bad: Tensor
    produced: Tensor
    origin: Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a buffer."""

    units: int
    ways: int
    modules: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        values = (self.units, len(TENSORS), 1 + self.ways, WIDTH)
        counts = (self.units, len(TENSORS))
        return (*[values] * 3, counts, (self.modules, len(SEEN)), (self.modules, len(PHASES)), (2, 3))

    @property
    def size(self) -> int:
        return sum(map(prod, self.shapes))

    def parts(self, flat: Tensor) -> Parts:
        """Views of a buffer [size]."""
        pieces = flat.split([prod(shape) for shape in self.shapes])
        return Parts(*[piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)])


class Store:
    """The buffer on the device."""

    def __init__(self, layout: Layout, device: torch.device, decay: float) -> None:
        self.layout, self.device, self.decay = layout, device, decay
        self.flat = torch.zeros(layout.size, device=device)
        self.parts = layout.parts(self.flat)
        self.parts.origin.fill_(NOWHERE)

    def add(self, unit: int, tensor: int, block: Tensor, *, valid: Tensor | None = None) -> None:
        """Take in a sample [rows, numbers], of the first rows that there are; not if `valid`, bool [], is false.

        Where it has fewer numbers than `WIDTH`, what is behind them stays zero.
        """
        rows, numbers = block.shape
        kept = (self.parts.last, self.parts.mean, self.parts.first)
        last, mean, first = (part[unit, tensor, :rows, :numbers] for part in kept)
        count = self.parts.count[unit, tensor]
        block = block.to(self.device, non_blocking=True)
        grown = mean.lerp(block, 1 - self.decay)
        begins = count == 0
        if valid is None:
            count += 1
        else:
            valid = valid.to(self.device, non_blocking=True)
            block, grown, begins = torch.where(valid, block, last), torch.where(valid, grown, mean), begins & valid
            count += valid
        last.copy_(block)
        mean.copy_(grown)
        first.copy_(torch.where(begins, block, first))

    def corrected(self, unit: int, tensor: int, field: int) -> Tensor:
        """The mean [] of the first row's field over the samples so far; NaN before the first."""
        count = self.parts.count[unit, tensor]
        return corrected(self.parts.mean[unit, tensor, 0, field], count, self.decay)

    def forget(self, unit: int) -> None:
        """Begin again with a layer."""
        for part in (self.parts.last, self.parts.mean, self.parts.first, self.parts.count):
            part[unit].zero_()


def corrected(mean: Tensor, count: Tensor, decay: float) -> Tensor:
    """An exponential mean without the weight of its beginning at zero; NaN where nothing was counted."""
    return mean / (1 - decay**count)


class Copies:
    """Copies of a buffer on their way to the host, in memory that is taken once; nothing waits for them.

    Where the device has neither pinned memory nor events there are none, and one reads the buffer itself.
    """

    def __init__(self, flat: Tensor, slots: int = 2) -> None:
        self._flat = flat
        device = flat.device
        module = None if device.type == "cpu" else torch.get_device_module(device)
        self.possible = device.type == "cpu" or (hasattr(module, "Event") and device.type != "mps")
        pinned = device.type != "cpu"
        self._free = [torch.empty(flat.shape, pin_memory=pinned) for _ in range(slots if self.possible else 0)]
        self._events = [None if module is None else module.Event() for _ in self._free]
        self._under_way: list[tuple[Tensor, Any, Any]] = []
        self.latest = torch.zeros(flat.shape)
        """What the copy that ended last brought."""

    def start(self, tag: Any) -> bool:
        """Begin to copy the buffer as it will be here in the device's order of work; False if no memory is free."""
        if not self._free:
            return False
        host, event = self._free.pop(), self._events.pop()
        host.copy_(self._flat, non_blocking=True)
        if event is not None:
            event.record()
        self._under_way.append((host, event, tag))
        return True

    def next(self) -> Any | None:
        """The tag of the next copy that has ended, with its values in `latest`; None if there is none."""
        if not self._under_way:
            return None
        host, event, tag = self._under_way[0]
        if event is not None and not event.query():
            return None
        del self._under_way[0]
        self.latest.copy_(host)
        self._free.append(host)
        self._events.append(event)
        return tag
