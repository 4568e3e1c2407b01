"""What a recipe costs in each product of a unit: of the loss, and of the gradient's accuracy.

Two currencies, both relative, so that budgets mean the same in every model:

loss    the predicted rise of the loss by a product of the forward, over the loss. Products of the backward change no
        loss at once.
noise   the variance that rounding adds to the gradient of all weights, over the variance that batches of this size
        give it anyway. With noise rho, training needs at most rho more examples (McCandlish et al., "An empirical
        model of large-batch training", arXiv 1812.06162).

The noise of each product:

wgrad   (eta_x + eta_g) row_energy / energy of all units, where eta are the relative errors of its operands
dgrad   (eta_g + eta_w) * PATH * energy of the units before it / energy of all units: their gradients pass through it
fprop   KAPPA * second: a changed output changes all gradients, and the Fisher information along the change says by
        how much
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from deepseek_mp.precision import Operand, Recipe, Role
from deepseek_mp.sensitivity.reading import Effect, UnitReading

KAPPA = 12.0
"""Noise per second-order change of a log-likelihood. On a small GPT in FP4 and FP8 it was 5-8 in the median of the
layers and 14-16 for all of them together (docs/profiler.md)."""
PATH = 0.15
"""The share of the gradients before a unit that passes through it. One in a plain chain of layers; in a residual
network a branch carries a part only: on the same GPT 0.10-0.15, median of the layers."""


class Predictor:
    """Predictions for the units that were measured.

    Args:
        readings: what was measured, by unit.
        loss: the mean loss of the same batches.
        curvature: the mean curvature (`sampling.Terms`): turns changes of the loss into those of a log-likelihood.
        kappa: noise per second-order change, if it is known better than the default.
    """

    def __init__(
        self, readings: Mapping[str, UnitReading], loss: float, *, curvature: float = 1.0, kappa: float = KAPPA
    ) -> None:
        self.readings = readings
        self._loss = abs(loss)
        self._curvature, self._kappa = curvature, kappa
        self._energy = math.fsum(reading.energy for reading in readings.values())
        ordered = sorted(readings.items(), key=lambda item: item[1].order)
        self._before: dict[str, float] = {}
        total = 0.0
        for name, reading in ordered:
            self._before[name] = total
            total += reading.energy

    def effect(self, unit: str, recipe: Recipe) -> Effect | None:
        """What was measured; None for a recipe that was not asked for."""
        return self.readings[unit].effects.get(recipe.name)

    def loss(self, unit: str, recipe: Recipe) -> float:
        """The relative rise of the loss to reckon with, not negative; infinite for an overflow or a loss of zero."""
        found = self.readings[unit].effects[recipe.name]
        if not found.loss_change:
            return 0.0
        return found.loss_change / self._loss if self._loss else math.inf

    def second_order(self, unit: str, recipe: Recipe) -> float:
        """The part of `loss` that chance hardly moves: a mean of squares; the first order is one of signed terms."""
        found = self.readings[unit].effects[recipe.name]
        if math.isinf(found.loss_change):
            return math.inf
        if not found.second:
            return 0.0
        return found.second / self._loss if self._loss else math.inf

    def noise(self, unit: str, recipe: Recipe, role: Role) -> float:
        """The relative variance added to the gradient by one product."""
        reading = self.readings[unit]
        found = reading.effects[recipe.name]
        if role is Role.FPROP:
            change = found.loss_change
            return math.inf if math.isinf(change) else self._kappa * self._curvature * found.second
        if not self._energy:
            return 0.0
        if role is Role.DGRAD:
            eta = found.product_error(role, Operand.GRAD_OUTPUT) + found.product_error(role, Operand.WEIGHT)
            return PATH * eta * self._before[unit] / self._energy
        eta = found.product_error(role, Operand.GRAD_OUTPUT) + found.product_error(role, Operand.INPUT)
        return eta * reading.row_energy / self._energy
