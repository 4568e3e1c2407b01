"""Records a call's kernels on a device that can replay them as one: a CUDA graph, or what stands for it elsewhere.

Before anything is recorded the call runs on the stream of recording, so that compilers and libraries have chosen, and
once with every wait for the device an error: a call that waits is found out while nothing is being recorded yet. What
still fails in between leaves allocator, generator and stream as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol

import torch

from deepseek_mp.backends import synchronize
from deepseek_mp.costs.timing import current_device
from deepseek_mp.ops.early_launch import early_launches

WARM = 2
"""Calls before the one that may not wait."""


class Recorder(Protocol):
    """What `Graphed` needs of a device."""

    bytes: int
    """Of memory that belongs to recordings."""

    def warm(self, call: Callable[[], Any]) -> None:
        """Run the call until it is as it will be recorded; raises where it waits for the device."""

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """A replay of the call, and the outputs that it writes to, the same tensors each time."""


def records(device: torch.device) -> bool:
    """Whether calls on the device can be recorded and replayed."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "CUDAGraph")


class DeviceRecorder:
    """Recordings of one device, in memory of their own that they share: no two of them run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._module: Any = torch.get_device_module(device)
        self._pool: Any = None

    def warm(self, call: Callable[[], Any]) -> None:
        with self._on_side(), early_launches(self.device):
            for _ in range(WARM):
                call()
            with _no_waiting(self._module):
                call()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        with current_device(self.device), early_launches(self.device):
            self._module.empty_cache()  # as recording does first; only then is more memory that of the recording
            before = torch.accelerator.memory_reserved(self.device)
            self._pool = self._pool or self._module.graph_pool_handle()
            try:
                graph, outputs = self._recorded(call)
            except BaseException:
                self._recover()
                raise
            self.bytes += max(0, torch.accelerator.memory_reserved(self.device) - before)
        return graph.replay, outputs

    def _recorded(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """On the stream of warming, since libraries have their working memory there."""
        graph = self._module.CUDAGraph()
        stream = _side_stream(self.device)
        with self._on_side(), self._module.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):  # fmt: skip
            outputs = call()
        return graph, outputs

    @contextmanager
    def _on_side(self) -> Iterator[None]:
        """A stream other than the caller's, between all of its work before and after. Left also after a failure."""
        with current_device(self.device):
            side, here = _side_stream(self.device), self._module.current_stream()
            side.wait_stream(here)
            try:
                with self._module.stream(side):
                    yield
            finally:
                self._module.set_stream(here)  # a recording that cannot be ended does not give its own back
                here.wait_stream(side)

    def _recover(self) -> None:
        """After a recording that could not be ended: the allocator and the generator still believe in it."""
        pool, self._pool = self._pool, None
        here = self._module.current_device()
        with suppress(AttributeError, RuntimeError):  # another vendor's, or it was ended
            torch._C._cuda_endAllocateToPool(here, pool)  # noqa: SLF001 - no public name
            torch._C._cuda_releasePool(here, pool)  # noqa: SLF001
        synchronize(self.device)
        # One that succeeds puts the generator's own note of recording right.
        self._recorded(lambda: torch.zeros(1, device=self.device).add_(1))
        synchronize(self.device)


@cache
def _side_stream(device: torch.device) -> Any:
    """One for all recordings on a device: libraries keep working memory for each stream forever."""
    module: Any = torch.get_device_module(device)
    return module.Stream(device=device)


@contextmanager
def _no_waiting(module: Any) -> Iterator[None]:
    """Inside, what makes the host wait for the device raises, where the device can say so."""
    mode = getattr(module, "get_sync_debug_mode", None)
    if mode is None:
        yield
        return
    before = mode()
    module.set_sync_debug_mode("error")
    try:
        yield
    finally:
        module.set_sync_debug_mode(before)
