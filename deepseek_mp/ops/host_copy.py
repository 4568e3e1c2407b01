"""Tensors of a device on their way to the host together, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


class HostCopy:
    """The values of some tensors at this moment, as FP32; reading them waits until they have arrived.

    One copy for all: they are joined on the device of the first, and go to pinned memory behind an event. On a CPU, and
    where a device has no such memory, there is nothing to wait for.

    Args:
        tensors: of any shapes; those of other devices are moved.
        mean: with several processes, the mean over all of them.
    """

    def __init__(self, tensors: Sequence[Tensor], *, mean: bool = False) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._event = None
        if not tensors:
            self._host = torch.zeros(0, device="cpu")
            return
        home = tensors[0].device
        moved = [tensor.detach().to(home, torch.float32, non_blocking=True) for tensor in tensors]
        # Single numbers, of which each training step has a few, are joined without a view of each.
        flat = torch.cat([tensor.reshape(-1) for tensor in moved]) if any(self._shapes) else torch.stack(moved)
        if mean and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(flat)
            flat /= distributed.get_world_size()
        module = None if home.type == "cpu" else torch.get_device_module(home)
        if module is None or not hasattr(module, "Event") or home.type == "mps":  # mps has no pinned host memory
            self._host = flat
            return
        self._host = torch.empty(flat.shape, device="cpu", pin_memory=True)
        self._host.copy_(flat, non_blocking=True)
        self._event = module.Event()
        self._event.record()

    @property
    def ready(self) -> bool:
        """Whether reading would not wait."""
        return self._event is None or bool(self._event.query())

    def numbers(self) -> list[float]:
        """All values as Python numbers, tensor after tensor."""
        self._wait()
        return [float(value) for value in self._host.tolist()]

    def tensors(self) -> list[Tensor]:
        """The tensors, in their shapes, on the host."""
        self._wait()
        host = self._host.cpu()
        sizes = [shape.numel() for shape in self._shapes]
        return [part.view(shape) for part, shape in zip(host.split(sizes), self._shapes, strict=True)]

    def _wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
