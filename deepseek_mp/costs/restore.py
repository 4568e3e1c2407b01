"""Puts a model back as it was before something was tried on it: gradients, buffers, attributes, random numbers.

`Snapshot` holds what a forward and backward may change and can put it back as often as needed, so
that each trial starts from the same state and nothing is left at the end. Parameters are not copied:
a forward and backward do not change them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from deepseek_mp.costs.attributes import Attributes
from deepseek_mp.costs.timing import current_device


class Snapshot:
    """The state of a model and of the random generators at one moment."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._random = random_states(device)
        self._modules = list(model.modules())
        self._training = [module.training for module in self._modules]
        self._buffers = [dict(module._buffers) for module in self._modules]  # noqa: SLF001
        kept = [buffer for buffers in self._buffers for buffer in buffers.values() if buffer is not None]
        self._values = {id(buffer): buffer.detach().clone() for buffer in kept}
        self._attributes = Attributes(self._modules)

    @torch.no_grad()
    def restore(self) -> None:
        """Put buffers (object and value), attributes, train/eval flags and random generators back."""
        self._attributes.put_back()
        for module, training, buffers in zip(self._modules, self._training, self._buffers, strict=True):
            module.training = training
            module._buffers.clear()  # noqa: SLF001
            module._buffers.update(buffers)  # noqa: SLF001
            for buffer in buffers.values():
                if buffer is not None:
                    buffer.copy_(self._values[id(buffer)])
        set_random_states(self._random, self._device)


def random_states(device: torch.device) -> tuple[Any, ...]:
    """The states of Python's, numpy's and PyTorch's generators, those of the CPU and of the device."""
    with current_device(device):
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), own


def set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    """Put back what `random_states` gave."""
    python, numpy, cpu, own = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if own is not None:
        with current_device(device):
            torch.get_device_module(device).set_rng_state(own)


class _Gradients:
    """The gradients of a model's parameters, and what runs when they are accumulated."""

    def __init__(self, model: nn.Module) -> None:
        self._gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        found = [parameter._post_accumulate_grad_hooks for parameter in model.parameters()]  # noqa: SLF001
        self._hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = [(hooks, dict(hooks)) for hooks in found if hooks]

    def set_aside(self) -> None:
        """No gradients, and no hooks after accumulation: an optimizer may step in one.

        Autograd holds on to the dictionary of the hooks, so it is emptied rather than taken away.
        """
        for parameter, _ in self._gradients:
            parameter.grad = None
        for hooks, _ in self._hooks:
            hooks.clear()

    def put_back(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for hooks, kept in self._hooks:
            hooks.update(kept)


@contextmanager
def preserved(model: nn.Module, device: torch.device) -> Iterator[Snapshot]:
    """Whatever is tried on the model inside, it is afterwards as it was, also after an exception.

    Gradients are set aside (the same objects come back) and buffers, attributes, train/eval flags and random
    generators restored; unused memory goes back to the device. The snapshot may be restored inside
    as well, to start each trial from the same state.
    """
    snapshot = Snapshot(model, device)
    gradients = _Gradients(model)
    try:
        gradients.set_aside()
        yield snapshot
    finally:
        gradients.put_back()
        snapshot.restore()
        release_memory(device)


def release_memory(device: torch.device) -> None:
    """Give cached, unused memory back to the device, where there is such a cache."""
    memory = getattr(torch.accelerator, "memory", None)
    if device.type != "cpu" and memory is not None:
        memory.empty_cache()
