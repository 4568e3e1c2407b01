"""`InputLook`: a cheap look at the inputs of lowered layers in every step; it takes a step back that it speaks against.

Probes are rare. Outliers that come between two of them would spoil the steps up to the next one, and one such step can
cost more than all of FP8 does. So some positions of each lowered layer's input are compared with what the last probes
saw: one reduction for a layer, nothing waits, and the device itself leaves the optimizer's step out.

An input that is not finite speaks against nothing here: the check of loss and gradients answers it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepseek_mp.nn.again import is_computed_again
from deepseek_mp.nn.conv1x1 import Convolution
from deepseek_mp.nn.lazy import Lazy, peeked, some_rows
from deepseek_mp.ops.host_copy import HostCopy

POSITIONS = 256
"""Positions that are looked at, about, evenly over the input: an outlier channel is in all of them."""
GROWTH = 16.0
"""How many times as large as in the probes an input must be. Batches and fast training make it two or three times."""
Sent = tuple[list[str], list[float], HostCopy]
"""Names of layers, the limits that the largest magnitudes of their inputs were judged by, and these on their way."""


class Hook:
    """Shows a layer's input to the look of this run. A copy of the model, deep or pickled, is another run's: its hooks
    do nothing.
    """

    def __init__(self, look: InputLook | None = None, name: str = "") -> None:
        self._look, self._name = look, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._look is not None:
            self._look.see(self._name, module, args[0] if args else next(iter(kwargs.values()), None))

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class InputLook:
    """Hooks on lowered layers; `limits` says which, and from which magnitude on.

    Each closed window is one call of `veto`, each settled one a call of `settle`, in the same order. The device may be
    behind by several windows: what it found in each waits in a queue, with the limits it was judged by.
    """

    def __init__(self) -> None:
        self.active = False
        """Whether a training step is running: probes and evaluations are not looked at."""
        self._limits: dict[str, float] = {}
        self._ordered: tuple[list[str], list[float], Tensor] | None = None
        """Names in the order of the calls, and their limits on the host and on the device, as FP32."""
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Tensor] = {}
        self._sent: deque[Sent | None] = deque()
        """One for each window that is closed and not settled, the oldest first; None where there is nothing to read."""
        self._grown: dict[str, float] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None
        """The input that was looked at last, the dimension of its channels, and its largest magnitude."""

    def begin(self) -> None:
        """A training step begins: what ran since the last one does not count."""
        self._seen, self._last, self.active = {}, None, True

    def watch(self, modules: Mapping[str, nn.Module], limits: Mapping[str, float]) -> None:
        """Look at these layers from now on, in the place of those before."""
        if limits.keys() != self._limits.keys():
            self._remove_hooks()
            for name in limits:
                self._handles.append(modules[name].register_forward_pre_hook(Hook(self, name), with_kwargs=True))
        if limits != self._limits:
            self._limits, self._ordered = dict(limits), None

    def close(self) -> None:
        """Take the hooks away and look no more. Windows that are not settled can still be."""
        self._remove_hooks()
        self._limits, self._ordered = {}, None
        self._seen, self._last, self.active = {}, None, False

    def see(self, name: str, module: nn.Module, given: Any) -> None:
        """Note how large the input of a layer is, in a training step."""
        if is_computed_again() or not (self.active and module.training and isinstance(given, Tensor) and given.numel()):
            return
        channels = _channels(module, given)
        if self._last is None or self._last[0] is not given or self._last[1] != channels:
            self._last = given, channels, _largest(given, channels)  # layers side by side read one input
        size = self._last[2]
        self._seen[name] = torch.maximum(self._seen[name], size) if name in self._seen else size

    def veto(self) -> Tensor | None:
        """0-dim FP32, on the device: 1 if an input of the window was finite and too large. None without any input.

        Ends the window.
        """
        seen, self._seen, self._last = self._seen, {}, None
        if not self.active or not seen:
            self._sent.append(None)
            return None
        names = list(seen)
        largest = torch.stack([seen[name] for name in names])
        if self._ordered is None or self._ordered[0] != names:
            limits = torch.tensor([self._limits[name] for name in names])
            self._ordered = names, limits.tolist(), limits.to(largest.device, non_blocking=True)
        _, judged_by, limits = self._ordered
        self._sent.append((names, judged_by, HostCopy([largest])))
        return ((largest > limits) & largest.isfinite()).any().float()

    def settle(self) -> None:
        """The outcome of the oldest closed window has been read: note what was too large in it."""
        if self._sent:
            self._note(self._sent.popleft())

    def grown(self) -> dict[str, float]:
        """The layers whose inputs were too large in a settled window, with their magnitudes; told once."""
        found, self._grown = self._grown, {}
        return found

    def state_dict(self) -> dict[str, float]:
        """What `grown` has still to tell. Waits for what is under way."""
        for index, sent in enumerate(self._sent):
            self._note(sent)
            self._sent[index] = None  # its window may still be settled
        return dict(self._grown)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there: windows that were closed before are forgotten."""
        self._grown = dict(state)
        self._sent.clear()

    def _note(self, sent: Sent | None) -> None:
        if sent is None:
            return
        names, limits, copied = sent
        for name, limit, size in zip(names, limits, copied.numbers(), strict=True):
            if limit < size < math.inf:
                self._grown[name] = max(size, self._grown.get(name, size))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}


def _channels(module: nn.Module, given: Tensor) -> int:
    """The dimension of the channels: a convolution has positions behind it, [N, C, H, W] say."""
    before = len(module.kernel_size) if isinstance(module, Convolution) else 0
    return max(0, given.dim() - 1 - before)


def _largest(given: Tensor, channels: int) -> Tensor:
    """0-dim FP32, of some positions with all their channels."""
    if isinstance(given, Lazy) and given.dim() > 1 and channels == given.dim() - 1:
        some = some_rows(given, max(1, given.numel() // given.shape[-1] // POSITIONS))
    else:
        some = _some_positions(peeked(given), channels)
    size: Tensor = torch.linalg.vector_norm(some, math.inf, dtype=torch.float32)
    return size


def _some_positions(given: Tensor, channels: int) -> Tensor:
    """A view of about `POSITIONS` positions, evenly over all dimensions but that of the channels, however it lies."""
    wanted, steps = POSITIONS, [1] * given.dim()
    others = sorted((dim for dim in range(given.dim()) if dim != channels), key=given.size)
    for done, dim in enumerate(others):  # what a short dimension has not, the longer ones give
        share = math.ceil(wanted ** (1 / (len(others) - done)))
        steps[dim] = math.ceil(given.shape[dim] / share)
        wanted = math.ceil(wanted / math.ceil(given.shape[dim] / steps[dim]))
    return given[tuple(slice(None, None, step) for step in steps)]
