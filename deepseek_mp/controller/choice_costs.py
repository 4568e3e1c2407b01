"""What each recipe costs a layer now, and which recipes are no choice for it: they break a limit or do not pay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from deepseek_mp.controller.adaptive_units import AdaptiveUnit
from deepseek_mp.controller.height import height, parts_of
from deepseek_mp.controller.limits import broken
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.controller.trend import Slope
from deepseek_mp.precision import RECIPES, Recipe, Role
from deepseek_mp.precision.composite import with_roles
from deepseek_mp.precision.planning import Predicted, UnitCosts, choice_for
from deepseek_mp.sensitivity import UnitReading
from deepseek_mp.sensitivity.prediction import Predictor

SURE_SLOPE = 3.0
"""Standard errors by which the loss may fall faster than it seems to."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A layer's costs by recipe, infinite for what is no choice."""

    costs: UnitCosts
    unpaid: str
    """Why the recipe that it runs in does not pay; empty where it does."""


@dataclass(frozen=True, kw_only=True)
class CostRules:
    """What all layers are judged by in one decision."""

    base: Recipe
    settings: AdaptiveSettings
    predictor: Predictor
    loss: float
    seconds: float
    """Of all layers in the base; 0 where nothing was timed."""
    slope: Slope | None
    remaining: int
    """Steps to the end of the run."""

    def judge(self, name: str, unit: AdaptiveUnit, reading: UnitReading, recipe: str) -> Judged:
        """The costs of the layer, which runs in `recipe` now."""
        predicted = {own: self._predicted(name, reading, RECIPES[own]) for own in reading.effects}
        costs = UnitCosts(name=name, macs=unit.macs, predicted=predicted, seconds=unit.seconds)
        now, roles = parts_of(recipe)
        unpaid = ""
        for own in [own for own in predicted if height(RECIPES[own]) < height(self.base)]:
            words = self._unpaid(
                costs, predicted[own], RECIPES[own], is_lowered=height(RECIPES[now]) < height(self.base)
            )
            if own == now and any(math.isinf(predicted[own][role].loss) for role in roles):
                unpaid = words
        return Judged(costs=costs, unpaid=unpaid)

    def _predicted(self, name: str, reading: UnitReading, recipe: Recipe) -> dict[Role, Predicted]:
        found = {}
        for role in Role:
            loss = self.predictor.loss(name, recipe) if role is Role.FPROP else 0.0
            if broken(reading.effects[recipe.name], recipe, [role]):
                loss = math.inf
            found[role] = Predicted(loss=loss, noise=self.predictor.noise(name, recipe, role))
        return found

    def _unpaid(self, costs: UnitCosts, products: dict[Role, Predicted], recipe: Recipe, *, is_lowered: bool) -> str:
        """Rules out what does not pay of the recipe, all of it or product by product; in words why, or nothing."""
        parts = [[role] for role in Role] if self.settings.by_role else [list(Role)]
        found = ""
        for roles in parts:
            words = self._does_not_pay(costs, with_roles(recipe, roles, self.base), is_lowered=is_lowered)
            if words:
                products.update({role: replace(products[role], loss=math.inf) for role in roles})
                found = found or words
        return found

    def _does_not_pay(self, costs: UnitCosts, recipe: Recipe, *, is_lowered: bool) -> str:
        """Why lowering saves less time than it costs steps; empty where it pays.

        What is lowered already stays until it costs twice as much: both numbers are estimates.
        """
        lowered, kept = choice_for(costs, recipe), choice_for(costs, self.base)
        if not costs.seconds or not self.seconds or math.isinf(lowered.loss):
            return ""
        saved = (kept.seconds - lowered.seconds) / self.seconds
        cost = max(lowered.noise - kept.noise, 0.0)
        if self.slope is not None:
            rise = max(lowered.loss - kept.loss, 0.0) * abs(self.loss)
            # As steep as it may be: batches scatter, and a flat stretch by chance is no reason.
            steepest = max(self.slope.fall + SURE_SLOPE * self.slope.error, 1e-9 * abs(self.loss))
            cost += rise / (steepest * self.remaining)
        times = self.settings.pays / (2 if is_lowered else 1)
        if saved >= times * cost:
            return ""
        return f"it would save {saved:.2%} of the time, less than {times:g} times its cost of {cost:.2%} of the steps"
