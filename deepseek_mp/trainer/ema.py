"""Exponential moving average of the trained weights, advanced on applied steps only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight, for every parameter that is trained.

    Kept in at least float32, on the device of the parameters. Buffers are not averaged. A parameter that is unfrozen or
    added later is averaged from its first applied step on: its average begins with the value after that. So is one that
    took the place of another of its name and has another shape.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self.values: dict[str, Tensor] = {name: _in_float32(p) for name, p in self._averaged({}).items()}

    def _averaged(self, known: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """The parameters that the model has now and that are trained, or were when they became `known`."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad or name in known}

    @torch.no_grad()
    def update(self) -> None:
        """Take one applied step into account."""
        averaged, before = self._averaged(self.values), self.values
        self.values = {
            name: before[name] if _fits(p, before.get(name)) else _in_float32(p) for name, p in averaged.items()
        }
        averages = list(self.values.values())
        weights = [p.detach().to(a.dtype) for p, a in zip(averaged.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside this context, its own again after it."""
        held = {name: p for name, p in self._averaged(self.values).items() if _fits(p, self.values.get(name))}
        own = {name: p.detach().clone() for name, p in held.items()}
        try:
            _write(held, self.values)
            yield
        finally:
            _write(held, own)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over saved averages, of parameters that the model has; these are the averaged ones from now on."""
        averaged = self._averaged(values)
        self.values = {name: _in_float32(averaged[name]).copy_(value) for name, value in values.items()}


def _in_float32(parameter: nn.Parameter) -> Tensor:
    """A copy of its values, in float32 at least."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def _fits(parameter: nn.Parameter, average: Tensor | None) -> bool:
    """Whether it is an average of such a parameter: another may have taken its name."""
    return average is not None and average.shape == parameter.shape


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, param in parameters.items():
        param.copy_(values[name])
