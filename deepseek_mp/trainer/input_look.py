"""`InputLook`: a cheap look at the inputs of lowered layers in every step; it takes a step back that it speaks against.

Probes are rare. Outliers that come between two of them would spoil the steps up to the next one, and one such step can
cost more than all of FP8 does. So some rows of each lowered layer's input are compared with what the last probes saw:
one reduction for a layer, nothing waits, and the device itself leaves the optimizer's step out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepseek_mp.nn.lazy import some_rows
from deepseek_mp.ops.host_copy import HostCopy

ROWS = 256
"""Rows that are looked at, evenly over the input: an outlier channel is in all of them."""
GROWTH = 16.0
"""How many times as large as in the probes an input must be. Batches and fast training make it two or three times."""


class InputLook:
    """Hooks on lowered layers; `limits` says which, and from which magnitude on."""

    def __init__(self) -> None:
        self.active = False
        """Whether a training step is running: probes and evaluations are not looked at."""
        self._limits: dict[str, float] = {}
        self._ordered: tuple[list[str], Tensor] | None = None
        """The limits on the device, in the order of the calls."""
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Tensor] = {}
        self._sent: tuple[list[str], HostCopy] | None = None
        self._grown: dict[str, float] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        """The input that was looked at last, and its largest magnitude."""

    def begin(self) -> None:
        """A training step begins: what ran since the last one does not count."""
        self._seen, self._last, self.active = {}, None, True

    def watch(self, modules: Mapping[str, nn.Module], limits: Mapping[str, float]) -> None:
        """Look at these layers from now on, in the place of those before."""
        if limits.keys() != self._limits.keys():
            self.close()
            for name in limits:
                self._handles.append(modules[name].register_forward_pre_hook(self._hook(name), with_kwargs=True))
        if limits != self._limits:
            self._limits, self._ordered = dict(limits), None

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._limits, self._ordered, self._seen = [], {}, None, {}

    def veto(self) -> Tensor | None:
        """0-dim FP32, on the device: 1 if an input of the step was too large. Ends the step; None without any input."""
        seen, self._seen, self._last = self._seen, {}, None
        if not self.active or not seen:
            return None
        names = list(seen)
        largest = torch.stack([seen[name] for name in names])
        if self._ordered is None or self._ordered[0] != names:
            limits = torch.tensor([self._limits[name] for name in names])
            self._ordered = names, limits.to(largest.device, non_blocking=True)
        self._sent = names, HostCopy([largest])
        return (largest > self._ordered[1]).any().float()

    def grown(self) -> dict[str, float]:
        """The layers whose inputs were too large in a step that has arrived, with their magnitudes; told once."""
        if self._sent is not None and self._sent[1].ready:
            self._arrive()
        found, self._grown = self._grown, {}
        return found

    def state_dict(self) -> dict[str, float]:
        """What `grown` has still to tell. Waits for it."""
        self._arrive()
        return dict(self._grown)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._grown, self._sent = dict(state), None

    def _arrive(self) -> None:
        if self._sent is None:
            return
        (names, sent), self._sent = self._sent, None
        (largest,) = sent.tensors()
        for name, size in zip(names, largest.tolist(), strict=True):
            if size > self._limits.get(name, float("inf")):
                self._grown[name] = size

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if not (self.active and module.training and isinstance(given, Tensor) and given.numel()):
                return
            if self._last is None or self._last[0] is not given:  # layers side by side read one input
                self._last = given, _largest(given)
            size = self._last[1]
            self._seen[name] = torch.maximum(self._seen[name], size) if name in self._seen else size

        return look


def _largest(given: Tensor) -> Tensor:
    """0-dim FP32, of some rows."""
    rows = given.numel() // given.shape[-1]
    some = some_rows(given, max(1, rows // ROWS)) if given.dim() > 1 else given.detach()
    size: Tensor = torch.linalg.vector_norm(some, float("inf"), dtype=torch.float32)
    return size
