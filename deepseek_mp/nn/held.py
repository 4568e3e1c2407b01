"""Quantised weights kept from one forward to the next, as long as the weights stay what they are.

A low-precision layer quantises its weight in every forward, which is right whatever happened to the
weight in between. Where several forwards are known to use the same weights (gradient accumulation),
they can be quantised once. The layers find them only inside of `HeldWeights.lent`; anything that runs
outside, an evaluation with averaged weights for one, quantises what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepseek_mp.nn.conv1x1 import as_matrix
from deepseek_mp.nn.functional import HeldWeight, Operands, Products, quantised_weight
from deepseek_mp.nn.unit import Unit, scaling_now


class HeldWeights:
    """The quantised weights of a model's low-precision layers, of those that are being trained.

    A trained weight changes in optimizer steps; PyTorch's version counters tell of other changes in place, but not
    of writes through `weight.data`, which would go unseen until the next step. Weights that are not trained are
    not held, since those are what models write in their forward (the momentum encoder of contrastive learning).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._operands: dict[Unit, Operands] = {}
        self._mark: object = None

    @contextmanager
    def lent(self, mark: object) -> Iterator[None]:
        """Inside, the layers use what is held. `mark` is equal as long as no weight and no plan has changed."""
        if self._mark != mark or not self._operands:
            self.drop()
            with torch.no_grad():
                self._operands = {
                    unit: quantised_weight(as_matrix(weight), how, scaling_now(unit))
                    for unit, weight, how in _layers(self._model)
                }
            self._mark = mark
        for unit, operands in self._operands.items():
            assert isinstance(unit.weight, Tensor)
            unit.held_weight = HeldWeight(unit.weight, operands)
        try:
            yield
        finally:
            for unit in self._operands:
                unit.__dict__.pop("held_weight", None)

    def drop(self) -> None:
        """Give the memory back."""
        self._operands, self._mark = {}, None


def _layers(model: nn.Module) -> Iterator[tuple[Unit, Tensor, Products]]:
    """The units that multiply in low precision, with their weights, as far as those are trained parameters."""
    for module in model.modules():
        if not isinstance(module, Unit):
            continue
        precision = module.unit_precision
        if precision.products is not None:
            weight = module.weight
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                yield module, weight, precision.products
