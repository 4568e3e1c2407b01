"""Exponential moving average of the trained weights, advanced on applied steps only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight, for every parameter that is trained.

    Kept in at least float32, on the device of the parameters. Buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._params.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take one applied step into account."""
        averages = list(self.values.values())
        weights = [p.detach().to(a.dtype) for p, a in zip(self._params.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside this context, its own again after it."""
        own = {name: p.detach().clone() for name, p in self._params.items()}
        try:
            self._write(self.values)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, param in self._params.items():
            param.copy_(values[name])

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over saved averages; the names must be those of the model."""
        for name, average in self.values.items():
            average.copy_(values[name])
