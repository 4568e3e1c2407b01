"""Many small tensors of one device on their way to the host together, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


class Transfer:
    """Copies tensors, as FP32, to the host; with several processes their mean over all of them.

    `ready` asks without waiting, `read` waits. On a CPU there is nothing to wait for.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._event = None
        if not tensors:
            self._host = torch.zeros(0)
            return
        flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(flat)
            flat /= distributed.get_world_size()
        home = flat.device
        module = None if home.type == "cpu" else torch.get_device_module(home)
        if module is None or not hasattr(module, "Event") or home.type == "mps":  # mps has no pinned host memory
            self._host = flat
            return
        self._host = torch.empty(flat.shape, pin_memory=True)
        self._host.copy_(flat, non_blocking=True)
        self._event = module.Event()
        self._event.record()

    @property
    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return self._event is None or bool(self._event.query())

    def read(self) -> list[Tensor]:
        """The tensors, in their shapes, on the host."""
        if self._event is not None:
            self._event.synchronize()
        host = self._host.cpu()
        sizes = [shape.numel() for shape in self._shapes]
        return [part.view(shape) for part, shape in zip(host.split(sizes), self._shapes, strict=True)]
