"""`Lanes`: copies between one device and the host, each way on a stream of its own where the device has streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseek_mp.optim.offload.schedule import BESIDE_BYTES, FP32_BYTES

STAGED_BYTES = 64 << 20
"""Of the device's memory that a copy up is cast from: so much of a tensor is sent and cast at a time."""


class Lanes(Protocol):
    """Two lanes of copies, down to the host and up to the device.

    A copy gives a mark, which stands for its end. The source must keep its numbers, and the target must not be read,
    before the mark was waited for.
    """

    def down(self, target: Tensor, source: Tensor) -> Any:
        """Copy from the device, after the work that its current stream has been given so far; casts on the device."""

    def up(self, targets: Sequence[Tensor], sources: Sequence[Tensor], *, readers: Any = None) -> Any:
        """Copy to the device; casts on the device. One mark is for all of them.

        Args:
            targets: on the device.
            sources: on the host, one for each target.
            readers: a mark of `now`: until the work before it has ended, targets keep their numbers. Copies need not
                wait for that in memory of the device beside them. None: the copies wait for the work that the device's
                current stream has been given so far.
        """

    def now(self) -> Any:
        """A mark of the work that the device's current stream has been given so far."""

    def wait(self, mark: Any) -> None:
        """Let the device's current stream wait for a copy."""

    def land(self, mark: Any) -> None:
        """Let the host wait for a copy."""

    def has_landed(self, mark: Any) -> bool:
        """Whether `land` would not have to wait."""


class DirectLanes:
    """Copies that have ended when the call returns: CPUs, and devices without streams. Marks are None."""

    def down(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def up(self, targets: Sequence[Tensor], sources: Sequence[Tensor], *, readers: None = None) -> None:  # noqa: ARG002
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def now(self) -> None:
        """What was given has ended."""

    def wait(self, mark: None) -> None:
        """Nothing to wait for."""

    def land(self, mark: None) -> None:
        """Nothing to wait for."""

    def has_landed(self, mark: None) -> bool:  # noqa: ARG002
        return True


class StreamLanes:
    """Copies on side streams of a device; marks are its events. The host's side should be pinned memory.

    Two are for the ways down and up, and a third one is for what was sent up beside its place and is to be put there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._down = self._module.Stream(device=device)
        self._up = self._module.Stream(device=device)
        self._put = self._module.Stream(device=device)
        self._beside: deque[tuple[Any, int]] = deque()
        """Marks of what is put into its place, with the bytes that it takes until then."""

    def down(self, target: Tensor, source: Tensor) -> Any:
        self._down.wait_stream(self._current())
        with self._module.stream(self._down):
            target.copy_(source.to(target.dtype).contiguous(), non_blocking=True)
        source.record_stream(self._down)
        return self._mark(self._down)

    def now(self) -> Any:
        return self._mark(self._current())

    def up(self, targets: Sequence[Tensor], sources: Sequence[Tensor], *, readers: Any = None) -> Any:
        beside = None if readers is None or readers.query() else self._memory_beside(targets)
        if beside is not None:
            return self._up_beside(targets, beside, sources, readers)
        if readers is None:
            self._up.wait_stream(self._current())
        else:
            self._up.wait_event(readers)
        with self._module.stream(self._up):
            for target, source in zip(targets, sources, strict=True):
                _copy_up(target, source)
        for target in targets:
            target.record_stream(self._up)
        return self._mark(self._up)

    def _memory_beside(self, targets: Sequence[Tensor]) -> list[Tensor] | None:
        """As much as these have, made on the way up; None where that would be too much, or the device has no more."""
        while self._beside and self._beside[0][0].query():
            self._beside.popleft()
        if sum(taken for _, taken in self._beside) + sum(target.nbytes for target in targets) > BESIDE_BYTES:
            return None
        try:
            with self._module.stream(self._up):
                return [torch.empty_like(target, memory_format=torch.contiguous_format) for target in targets]
        except torch.OutOfMemoryError:  # the copies can wait
            return None

    def _up_beside(
        self, targets: Sequence[Tensor], beside: Sequence[Tensor], sources: Sequence[Tensor], readers: Any
    ) -> Any:
        """Copy at once into the memory beside, and from there when the readers have ended."""
        with self._module.stream(self._up):
            for room, source in zip(beside, sources, strict=True):
                _copy_up(room, source)
        self._put.wait_event(self._mark(self._up))
        self._put.wait_event(readers)
        with self._module.stream(self._put):
            for target, room in zip(targets, beside, strict=True):
                target.copy_(room, non_blocking=True)
        for tensor in (*targets, *beside):
            tensor.record_stream(self._put)
        mark = self._mark(self._put)
        self._beside.append((mark, sum(room.nbytes for room in beside)))
        return mark

    def wait(self, mark: Any) -> None:
        self._current().wait_event(mark)

    def land(self, mark: Any) -> None:
        mark.synchronize()

    def has_landed(self, mark: Any) -> bool:
        return bool(mark.query())

    def _current(self) -> Any:
        return self._module.current_stream(self._device)

    def _mark(self, stream: Any) -> Any:
        event = self._module.Event()
        event.record(stream)
        return event


def _copy_up(target: Tensor, source: Tensor) -> None:
    """Copy on the current stream. What casts or changes strides goes through memory of the device: a copy that did it
    itself would do so on the host, and wait.

    The memory is the stream's: the next piece gets it at once, and writes it when this one has been read.
    """
    if source.dtype is target.dtype and target.is_contiguous():
        target.copy_(source, non_blocking=True)
        return
    if target.is_contiguous() and source.is_contiguous():
        target, source = target.view(-1), source.view(-1)
    for part, values in zip(_in_pieces(target), _in_pieces(source), strict=True):
        here = torch.empty(values.shape, dtype=values.dtype, device=target.device)
        here.copy_(values, non_blocking=True)
        part.copy_(here)
        del here  # else the next one would be made while there is still this one


def _in_pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views along the first dimension, with `STAGED_BYTES` in FP32 at most, but at least one row."""
    if tensor.numel() * FP32_BYTES <= STAGED_BYTES or not tensor.dim():
        return [tensor]
    rows = max(1, STAGED_BYTES * tensor.shape[0] // (tensor.numel() * FP32_BYTES))
    return [tensor[first : first + rows] for first in range(0, tensor.shape[0], rows)]


def lanes_for(device: torch.device) -> Lanes:
    """The lanes of a device: on streams if it has them."""
    if device.type in ("cpu", "meta"):
        return DirectLanes()
    module = torch.get_device_module(device)
    streams = all(hasattr(module, name) for name in ("Stream", "stream", "Event", "current_stream"))
    return StreamLanes(device) if streams else DirectLanes()
