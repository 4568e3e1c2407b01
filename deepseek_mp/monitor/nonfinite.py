"""Which modules meet infinities and NaN in one step, and which one made them of finite numbers.

A module is a *producer* in the forward if its inputs are finite and its outputs are not, or if its own weights are not;
in the backward if the gradients of its outputs are finite and one of an input is not. Modules that pass on what they
were given are none. Modules inside of others are looked at first.

Infinities can be meant: masks are made of them. So a producer counts only if the model's output, or a gradient that was
watched, was not finite in the end. Where the output is not, what the backward makes of it is nobody's fault: if no
module made it, the batch was bad.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.monitor.module_calls import Look
from deepseek_mp.monitor.store import NOWHERE, PHASES, SEEN, Store
from deepseek_mp.monitor.subjects import is_plain
from deepseek_mp.nn.lazy import peeked
from deepseek_mp.nn.nested import numbers, tensors
from deepseek_mp.ops.moved import moved
from deepseek_mp.ops.non_finite import non_finite
from deepseek_mp.ops.own_work import own_work

_FORWARD, _BACKWARD = range(len(PHASES))


class NonFiniteWatch:
    """Counts on the device, at calls of modules and on the way back, in one step.

    What it learns goes into the store at `close`.
    """

    def __init__(self, store: Store, modules: Mapping[nn.Module, int], step: int) -> None:
        """`modules`: those to watch, with their places in the store."""
        self._store, self._modules, self._step = store, modules, step
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        """id of a tensor -> the tensor, its version and how many of its values are not finite."""
        device = store.device
        self._bad = torch.zeros_like(store.parts.bad)
        self._first = torch.full((2,), NOWHERE, device=device)
        """Module and phase of the first producer."""
        self._output_bad, self._gradient_bad = torch.zeros(2, dtype=torch.bool, device=device).unbind()
        self.is_open = True

    def looks(self) -> dict[nn.Module, Look]:
        """What is to look at each module."""
        return {module: self._look_at(module, place) for module, place in self._modules.items()}

    def close(self) -> None:
        """The step is over."""
        if not self.is_open:
            return
        self.is_open = False
        self._seen = {}
        parts = self._store.parts
        with own_work():
            parts.bad.add_(self._bad)
            found = (self._output_bad | self._gradient_bad) & (self._first[0] >= 0)
            place = (self._first[0] * len(PHASES) + self._first[1]).clamp_min(0).long()
            parts.produced.view(-1).index_add_(0, place.view(1), found.float().view(1))
            latest = torch.cat([torch.full_like(self._first[:1], self._step), self._first])
            parts.origin[1] = torch.where(found, latest, NOWHERE)
            parts.origin[0] = torch.where(found & (parts.origin[0, 0] < 0), latest, parts.origin[0])

    def look_at_root(self, _args: Any, _kwargs: Any, output: Any) -> None:
        """See whether the model's output is finite."""
        if self.is_open and torch.is_grad_enabled():
            with own_work():
                self._output_bad |= self._count(output) > 0

    def _look_at(self, module: nn.Module, place: int) -> Look:
        def look(args: Any, kwargs: Any, output: Any) -> None:
            if not self.is_open or not torch.is_grad_enabled():
                return
            with own_work():
                given = self._count((args, kwargs))
                made = self._count(output)
                own = self._count(list(module.parameters(recurse=False)))
                for where, found in (("input", given), ("output", made), ("weight", own)):
                    self._bad[place, SEEN.index(where)] += found
                self._judge(place, _FORWARD, (made > 0) & ((given == 0) | (own > 0)))
                self._watch_backward(place, (args, kwargs), output)

        return look

    def _watch_backward(self, place: int, inputs: Any, outputs: Any) -> None:
        """Modules inside of others come first, so that their hooks on a shared tensor do too."""
        arrived = torch.zeros((), device=self._store.device)

        def leaving(grad: Tensor) -> None:
            if self.is_open:
                with own_work():
                    found = self._count(grad)
                    arrived.add_(found)
                    self._bad[place, SEEN.index("grad_output")] += found
                    self._gradient_bad |= found > 0

        def entering(grad: Tensor) -> None:
            if self.is_open:
                with own_work():
                    found = self._count(grad) > 0
                    self._gradient_bad |= found
                    self._judge(place, _BACKWARD, found & (arrived == 0) & ~self._output_bad)

        made = [tensor for tensor in tensors(outputs) if tensor.requires_grad]
        for tensor in made:
            tensor.register_hook(leaving)
        for tensor in tensors(inputs):
            if tensor.requires_grad and not any(tensor is other for other in made):
                tensor.register_hook(entering)

    def _judge(self, place: int, phase: int, is_producer: Tensor) -> None:
        """Note a producer if it is the first."""
        is_first = is_producer & (self._first[0] < 0)
        self._first[0].masked_fill_(is_first, place)
        self._first[1].masked_fill_(is_first, phase)

    def _count(self, tree: Any) -> Tensor:
        """How many numbers of the tensors in `tree` are not finite, FP32 [] where the store is."""
        total = torch.zeros((), device=self._store.device)
        for tensor in numbers(tree):
            if is_plain(tensor):
                total += self._of(tensor)
        return total

    def _of(self, tensor: Tensor) -> Tensor:
        """The same of one tensor, which is looked at once: the output of a module is the input of the next."""
        known = self._seen.get(id(tensor))
        version = tensor._version  # noqa: SLF001 - there is no public one
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2]
        found = moved(non_finite(peeked(tensor)), self._store.device)
        self._seen[id(tensor)] = (weakref.ref(tensor), version, found)
        return found
