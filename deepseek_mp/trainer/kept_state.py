"""Keeps all that training changes in a trainer, on the host, and puts it back bit for bit after something was tried.

Copies lie in the host's memory, so that what is tried finds the device's as full as training would. What belongs to
steps that are counted (the scheduler, the average of the weights, records, callbacks) is not touched by a trial and not
kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.costs.attributes import Attributes
from deepseek_mp.costs.restore import preserved
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.trainer.offloaded import synchronize, trial_steps

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

_OF_ALL = frozenset(vars(Optimizer([torch.zeros(())], {})))
"""What every optimizer has: options and state are kept apart, and hooks are no result of a step."""


@contextmanager
def kept_state(trainer: MixedPrecisionTrainer) -> Iterator[None]:
    """Whatever training steps change inside, afterwards it is as it was, also after an exception.

    Parameters, buffers, gradients (set aside inside), optimizer, delayed scales, attributes, train and eval flags, and
    random generators; of a loss that is a module too. Unused memory goes back to the device.
    """
    model, optimizer = trainer.model, trainer.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    synchronize(optimizer)
    loss = trainer.loss_fn if isinstance(trainer.loss_fn, nn.Module) else nn.Module()
    with preserved(model, trainer.device), preserved(loss, trainer.device):
        parameters = {id(p): _Value(p) for p in (*model.parameters(), *trained)}
        scales = [_Value(part) for found in scales_of(model) for part in (*found.amax, *_own_tensors(found))]
        states = [_OptimizerState(one) for one in _steppers(optimizer)]
        try:
            with trial_steps(optimizer):
                yield
        finally:
            for state in states:
                state.put_back()
            for value in (*parameters.values(), *scales):
                value.put_back()
            torch.clear_autocast_cache()


class _Value:
    """A tensor, and a copy of its values on the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._copy = tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def put_back(self) -> None:
        self.tensor.copy_(self._copy)


class _OptimizerState:
    """What an optimizer holds: the state of each parameter, the options of its groups, and attributes of its own.

    What the host holds of an offloaded one is put back by itself.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._numbers = _numbers(optimizer)
        self._attributes = Attributes(() if isinstance(optimizer, OffloadedOptimizer) else (optimizer,), _OF_ALL)
        self._state = {parameter: _kept(entries) for parameter, entries in optimizer.state.items()}
        self._groups = [_kept({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]

    def put_back(self) -> None:
        for name in _numbers(self._optimizer):
            delattr(self._optimizer, name)
        vars(self._optimizer).update(self._numbers)
        self._attributes.put_back()
        state = self._optimizer.state
        for parameter in [p for p in state if p not in self._state]:
            del state[parameter]
        for parameter, entries in self._state.items():
            _put_back(state[parameter], entries)
        for group, entries in zip(self._optimizer.param_groups, self._groups, strict=True):
            _put_back(group, {"params": group["params"], **entries})


def _steppers(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer and those that it steps by, in attributes of its own or in containers there; each once.

    One may know the other in turn.
    """
    found: list[Optimizer] = []
    left: list[Any] = [optimizer]
    while left:
        one = left.pop()
        if isinstance(one, Optimizer) and not any(one is known for known in found):
            found.append(one)
            left.extend(() if isinstance(one, OffloadedOptimizer) else vars(one).values())
        elif isinstance(one, Mapping):
            left.extend(value for value in one.values() if isinstance(value, Optimizer))
        elif isinstance(one, list | tuple):
            left.extend(value for value in one if isinstance(value, Optimizer))
    return found


def _kept(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries by name: a tensor with its values, anything else as a copy."""
    return {k: _Value(v) if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in entries.items()}


def _put_back(now: dict[str, Any], kept: dict[str, Any]) -> None:
    now.clear()
    for name, value in kept.items():
        if isinstance(value, _Value):
            value.put_back()
            now[name] = value.tensor
        else:
            now[name] = value


def _numbers(owner: object) -> dict[str, Any]:
    """Attributes that are numbers, flags or None."""
    return {name: value for name, value in vars(owner).items() if isinstance(value, int | float | None)}


def _own_tensors(owner: object) -> list[Tensor]:
    return [value for value in vars(owner).values() if isinstance(value, Tensor)]
