"""Bytes that training holds for each parameter, counted: the weights, what the optimizer keeps, the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deepseek_mp.optim.stored import StoredOptimizer
from deepseek_mp.precision.storage import StorageFormat


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of the parameters that are stored in one format."""

    values: int = 0
    """Numbers that the parameters have."""
    weights: int = 0
    state: int = 0
    """Moments and compensation."""
    gradients: int = 0
    """Those that are there now."""

    @property
    def total(self) -> int:
        return self.weights + self.state + self.gradients

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            values=self.values + other.values,
            weights=self.weights + other.weights,
            state=self.state + other.state,
            gradients=self.gradients + other.gradients,
        )


def footprint(optimizer: StoredOptimizer) -> Mapping[StorageFormat, Footprint]:
    """What the optimizer's parameters hold, by storage; formats that none has are left out."""
    found: dict[StorageFormat, Footprint] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            format = optimizer.storage(parameter)
            found[format] = found.get(format, Footprint()) + _of(optimizer, parameter)
    return found


def _of(optimizer: StoredOptimizer, parameter: Tensor) -> Footprint:
    kept = optimizer.state[parameter].values() if parameter in optimizer.state else ()
    return Footprint(
        values=parameter.numel(),
        weights=parameter.nbytes,
        state=sum(value.nbytes for value in kept if isinstance(value, Tensor)),
        gradients=0 if parameter.grad is None else parameter.grad.nbytes,
    )
