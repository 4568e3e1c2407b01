"""What each recipe costs a layer now, and which recipes are no choice for it: they break a limit or do not pay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepseek_mp.controller.adaptive_units import AdaptiveUnit
from deepseek_mp.controller.height import height, parts_of
from deepseek_mp.controller.limits import broken, out_of_range
from deepseek_mp.controller.region import HARM, LESS_HARM, harbour, rounding, shares
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.controller.trend import Slope
from deepseek_mp.precision import RECIPES, Recipe, Role
from deepseek_mp.precision.allocation import Choice
from deepseek_mp.precision.composite import with_roles
from deepseek_mp.precision.planning import Predicted, UnitCosts, choice_for, choices_of
from deepseek_mp.sensitivity import UnitReading
from deepseek_mp.sensitivity.prediction import Predictor

NEVER = Predicted(loss=math.inf, noise=0.0)
SURE_SLOPE = 3.0
"""Standard errors by which the loss may fall faster than it seems to."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A layer's costs by recipe, infinite for what is no choice."""

    base: str
    costs: UnitCosts
    known: UnitCosts
    """The same, infinite only for what breaks a limit: what does not pay has costs too."""
    refused: dict[str, str]
    """Lower recipes that are no choice now, each with the reason."""
    unpaid: str
    """Why the recipe that it runs in does not pay; empty where it does."""
    above: str
    """The recipe above the base that it is to run in, since the base harms; empty where it does not."""
    harm: float
    """The share of a budget that the base takes in it."""

    @property
    def least(self) -> Predicted:
        """What it costs where nothing is lowered."""
        products = self.costs.predicted.get(self.above or self.base, {}).values()
        return Predicted(loss=math.fsum(p.loss for p in products), noise=math.fsum(p.noise for p in products))


def in_force(
    judged: Mapping[str, Judged], lowered: Mapping[str, str], recipes: Sequence[Recipe], base: Recipe, **how: Any
) -> Predicted:
    """What all layers cost as they run now.

    Args:
        lowered: layers below the base, each with its recipe. What does not pay is no choice, but its costs are known.
        how: `by_role` and `objective` of `choices_of`.
    """
    loss = noise = 0.0
    for name, found in judged.items():
        cost: Predicted | Choice = found.least
        if name in lowered and not found.above:
            recipe = choices_of(found.known, recipes, base, **how).get(lowered[name])
            cost = found.least if recipe is None else choice_for(found.known, recipe)
        loss += cost.loss
        noise += cost.noise
    return Predicted(loss=loss, noise=noise)


@dataclass(frozen=True, kw_only=True)
class CostRules:
    """What all layers are judged by in one decision."""

    base: Recipe
    settings: AdaptiveSettings
    predictor: Predictor
    loss: float
    seconds: float
    """Of all layers in the base, or of the whole step where that was timed; 0 where nothing was."""
    kept: float = 1.0
    """How much of what the layers' timings promise a step was seen to save."""
    slope: Slope | None
    remaining: int
    """Steps to the end of the run."""

    def judge(self, name: str, unit: AdaptiveUnit, reading: UnitReading, recipe: str) -> Judged:
        """The costs of the layer, which runs in `recipe` now."""
        predicted = {own: self._predicted(name, reading, RECIPES[own]) for own in reading.effects}
        costs = UnitCosts(name=name, macs=unit.macs, predicted=predicted, seconds=unit.seconds, inputs=unit.inputs)
        known = replace(costs, predicted={own: dict(products) for own, products in predicted.items()})
        now, roles = parts_of(recipe)
        lower = [own for own in predicted if height(RECIPES[own]) < height(self.base)]
        unpaid, refused = "", dict[str, str]()
        for own in lower:
            refused[own] = out_of_range(reading, RECIPES[own]) or broken(reading.effects[own], RECIPES[own], list(Role))
            words = self._unpaid(costs, predicted[own], RECIPES[own], is_lowered=now in lower)
            refused[own] = refused[own] or words
            if own == now and any(math.isinf(predicted[own][role].loss) for role in roles):
                unpaid = words
        found = shares(name, self.predictor, self.settings)
        harm = found.of.get(self.base.name, 0.0)
        most = LESS_HARM if height(RECIPES[now]) > height(self.base) else HARM
        above = harbour(costs, unit.recipes, self.base, found) if harm > most else ""
        self._rule_out(predicted, above)
        costs = replace(costs, above=above)
        refused = {own: words for own, words in refused.items() if words}
        return Judged(
            costs=costs, known=known, refused=refused, unpaid=unpaid, above=above, harm=harm, base=self.base.name
        )

    def _rule_out(self, predicted: dict[str, dict[Role, Predicted]], above: str) -> None:
        """A layer that the base harms has one choice, above it; any other has none there."""
        stays = above or self.base.name
        for own in {"fp32", self.base.name, *predicted} - {stays}:
            if above or height(RECIPES[own]) > height(self.base):
                predicted[own] = dict.fromkeys(Role, NEVER)
        if any(math.isinf(product.loss) for product in predicted.get(stays, {}).values()):
            predicted[stays] = {}  # there is nothing better

    def _predicted(self, name: str, reading: UnitReading, recipe: Recipe) -> dict[Role, Predicted]:
        if height(recipe) >= height(self.base):
            return rounding(name, recipe, self.predictor)
        found = {}
        unsafe = bool(out_of_range(reading, recipe))
        for role in Role:
            loss = self.predictor.loss(name, recipe) if role is Role.FPROP else 0.0
            if unsafe or broken(reading.effects[recipe.name], recipe, [role]):
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
        if self.settings.objective != "time":
            return ""  # steps are not to be had for bytes: the budgets alone decide
        lowered, kept = choice_for(costs, recipe), choice_for(costs, self.base)
        if not costs.seconds or not self.seconds or math.isinf(lowered.loss):
            return ""
        if self.kept <= 0:
            return "steps became no faster when layers were lowered"
        saved = self.kept * (kept.seconds - lowered.seconds) / self.seconds
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
