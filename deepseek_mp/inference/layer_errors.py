"""What other kinds of some linear layers do to a model's outputs, all else being in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deepseek_mp.costs.restore import Snapshot
from deepseek_mp.inference.fidelity import Metric, error_of
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.quantised_linear import QuantisedLinear
from deepseek_mp.nn.places import places_of, put


class LayerErrors:
    """The metric of a copy in 16 bits with some of its layers in other kinds. After each look it is as it was.

    Args:
        model: the original, whose weights are rounded; it is only read.
        base: its copy in 16 bits, with layers of the same names.
        call: gives the outputs of whatever `base` holds.
        reference: what they are measured against.
        dtype: of the activations.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        call: Callable[[], Any],
        *,
        reference: Any,
        metric: Metric,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model, self._base, self._call = model, base, call
        self._reference, self._metric, self._dtype = reference, metric, dtype
        self._device = device
        self.looks = 0
        """Calls of the model so far."""

    def error(self, kinds: Mapping[str, str]) -> float:
        """With these kinds by layer; infinite where that or an output is not finite.

        What a kind or the model raises is raised.
        """
        with torch.no_grad():
            made = {name: self._layer(name, kind) for name, kind in kinds.items()}
        self.looks += 1
        with undone(self._base, self._device), in_place(self._base, made):
            outputs = self._call()
        return error_of(self._metric, outputs, self._reference)

    def _layer(self, name: str, kind: str) -> nn.Module:
        kept = KINDS[kind].keep(_linear(self._model, name).weight, f"weight of {name!r}")
        return QuantisedLinear(kept, _linear(self._base, name).bias, kind, self._dtype).eval()


@contextmanager
def undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """What calls inside do to the model's state, and to PyTorch's generators, is undone at the end."""
    before = Snapshot(model, device)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def in_place(model: nn.Module, made: Mapping[str, nn.Module]) -> Iterator[None]:
    """The modules stand in all places of those of their names."""
    places = places_of(model, made)
    own = {name: model.get_submodule(name) for name in made}
    try:
        for name, found in places.items():
            put(found, made[name])
        yield
    finally:
        for name, found in places.items():
            put(found, own[name])


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear), "asked only of names that `linear_layers` gave"
    return found
