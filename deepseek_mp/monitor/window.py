"""The time during which the monitor counts: opened before a step's forward, closed after its backward.

A window opens in one of two ways. `held` by a `with` statement it is balanced. `open_ended` it begins
just before the model's forward and ends when something shows that the step is over; then its mode
stands under all others on the dispatch stack, so that neither side removes the other's.

Closing stops the counting at once. What cannot be taken away at that moment, because PyTorch is
iterating over the hooks or would put the mode back, is taken away by `sweep` at the next chance; until
then it passes everything on.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from deepseek_mp.monitor import internals
from deepseek_mp.monitor.places import Places
from deepseek_mp.monitor.reasons import wide_layers
from deepseek_mp.monitor.tally import Tally
from deepseek_mp.monitor.taps import DispatchTap, Recorder, hook_modules, layer_names
from deepseek_mp.nn.again import is_computed_again

MAX_FORWARDS = 64
"""Forwards without a backward that one open-ended window counts: a loop of them is not one step."""


class Window:
    """Mode, hooks and compiler stance of one sampled step."""

    def __init__(self, model: nn.Module, tally: Tally) -> None:
        layers, parameters = layer_names(model)
        self.places = Places(layers, parameters, _device_types(model))
        self.recorder = Recorder(tally, self.places, wide_layers(model, layers))
        self.is_open = False
        self.is_held = False
        self._owner = threading.get_ident()
        self._train = torch.is_grad_enabled()
        self._forwards = 1
        self._model = model
        self._tap = DispatchTap(self.recorder)
        self._modules: list[RemovableHandle] = []
        self._optimizers: list[RemovableHandle] = []
        self._stance: AbstractContextManager[object] | None = None
        if any(internals.is_compiled(module) for module in model.modules()):
            tally.compiled_counted_eagerly = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Count what runs inside the `with` statement."""
        self.is_open = self.is_held = True
        self._modules = hook_modules(self._model, self._entered, self._left)
        try:
            with internals.eager_stance(), self._tap:
                yield
        finally:
            self.is_open = self.recorder.counting = False
            self._unhook()

    def open_ended(self, *, entered: bool) -> None:
        """Count from now on until `close`. `entered`: the model's call has begun, its entry hooks are past."""
        self.is_open = True
        self._stance = internals.eager_stance()
        self._modules = hook_modules(self._model, self._entered, self._left)
        self._optimizers = [
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]
        internals.push_lowest(self._tap)
        if entered:
            self.places.enter(self._model)

    def takes(self, *, train: bool) -> bool:
        """Whether a call of the model that is about to run belongs to this window's step."""
        if not self.is_open or threading.get_ident() != self._owner:
            return False
        if self.is_held:
            self.recorder.backward_seen = False
            return True
        if not (train and self._train) or self.recorder.backward_seen or self._forwards >= MAX_FORWARDS:
            return False
        self._forwards += 1
        return True

    @property
    def inside(self) -> bool:
        """Whether this thread is inside a call of the model that the window saw begin."""
        stack = self.places.here.stack
        return self.is_open and bool(stack) and (len(stack) > 1 or stack[-1].module != id(self._model))

    def close(self, *, unhook: bool = True) -> None:
        """Stop counting. Without `unhook` the module hooks stay until `sweep`."""
        if not self.is_open or self.is_held:
            return
        self.is_open = self.recorder.counting = False
        if unhook:
            self._unhook()
        self._withdraw()

    def sweep(self) -> bool:
        """Take away what `close` had to leave; False if something is still there."""
        if self.is_open:
            return False
        self._unhook()
        for handle in self._optimizers:
            handle.remove()
        self._optimizers = []
        return self.is_held or self._withdraw()

    def _entered(self, module: nn.Module, _args: Any) -> None:
        if not is_computed_again():
            self.places.enter(module)

    def _left(self, module: nn.Module, _args: Any, output: Any) -> None:
        if is_computed_again():
            return
        self.places.leave(module)
        ended = module is self._model and not self.places.here.stack
        # Without gradients, or after an error (PyTorch then gives None), no backward can follow.
        if ended and (output is None or not self._train) and internals.backward_task() == internals.NO_TASK:
            self.close(unhook=output is not None)

    def _before_optimizer(self, *_: Any) -> None:
        if internals.backward_task() == internals.NO_TASK:
            self.close()
        else:  # an optimizer that steps inside the backward, parameter by parameter
            self.recorder.counting = False

    def _after_optimizer(self, *_: Any) -> None:
        self.recorder.counting = self.is_open

    def _withdraw(self) -> bool:
        """Take mode and stance back where that lasts; False if not here."""
        if threading.get_ident() != self._owner or internals.is_temporary():
            return False
        internals.remove_mode(self._tap)
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        return True

    def _unhook(self) -> None:
        for handle in self._modules:
            handle.remove()
        self._modules = []


def _device_types(model: nn.Module) -> frozenset[str]:
    """Types of the devices the model is on; of one without parameters, all that it can run on."""
    found = frozenset(tensor.device.type for tensor in itertools.chain(model.parameters(), model.buffers()))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return found or frozenset({"cpu"} if accelerator is None else {"cpu", accelerator.type})
