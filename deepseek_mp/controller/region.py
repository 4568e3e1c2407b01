"""Whether the format of the region is itself too coarse for a layer, and what above it the layer should run in then.

A healthy layer in BF16 took less than a hundredth of the budgets of live precision, with outliers in its input four to
sixty. Only the second order counts, and the noise: the first order is a signed mean that chance
moves, the second is the mean of squares. So nothing goes above the region by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepseek_mp.controller.height import height
from deepseek_mp.controller.limits import out_of_range
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.precision import RECIPES, Recipe, Role
from deepseek_mp.precision.planning import Predicted, UnitCosts, choice_for
from deepseek_mp.sensitivity.prediction import Predictor

HARM = 0.05
"""Share of a budget that rounding to the region's format must take in one layer, in the mean of its probes."""
LESS_HARM = HARM / 2
"""It stays above the region until the share is below this."""
HARM_WITH_ALARM = HARM / 5
"""The share in one probe that is enough where a guard fires in the same probe."""
SUDDEN_HARM = 5 * HARM
"""The share in one probe that is enough alone."""
EXACT = HARM / 10
"""A format above the region is exact enough where it takes no more."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What plain recipes take of the budgets in one layer: the larger share of the two, by recipe."""

    of: Mapping[str, float]
    unsafe: Mapping[str, str]
    """Those whose range is not safe, with the reason."""

    def exact_enough(self, recipe: str) -> bool:
        return self.of.get(recipe, 0.0) <= EXACT and recipe not in self.unsafe


def rounding(name: str, recipe: Recipe, predictor: Predictor) -> dict[Role, Predicted]:
    """What a plain recipe that was measured costs for sure, by product: of the loss its second order only."""
    rise = predictor.second_order(name, recipe)
    return {
        role: Predicted(loss=rise if role is Role.FPROP else 0.0, noise=predictor.noise(name, recipe, role))
        for role in Role
    }


def shares(name: str, predictor: Predictor, settings: AdaptiveSettings) -> Shares:
    """Of all plain recipes that were measured."""
    reading = predictor.readings[name]
    plain = [RECIPES[own] for own in reading.effects if RECIPES[own].is_plain]
    found = {}
    for recipe in plain:
        products = rounding(name, recipe, predictor).values()
        rise, noise = math.fsum(p.loss for p in products), math.fsum(p.noise for p in products)
        found[recipe.name] = max(rise / settings.loss_budget, noise / settings.noise_budget)
    unsafe = {recipe.name: out_of_range(reading, recipe) for recipe in plain}
    return Shares(of=found, unsafe={own: words for own, words in unsafe.items() if words})


def harbour(costs: UnitCosts, recipes: Sequence[str], base: Recipe, found: Shares) -> str:
    """The recipe above the base to go to: the fastest that is exact enough, else the highest; empty without any."""
    above = [r for r in recipes if height(RECIPES[r]) > height(base) and r not in found.unsafe]
    exact = [r for r in above if found.exact_enough(r)]
    if exact:
        return min(exact, key=lambda r: (choice_for(costs, RECIPES[r]).seconds, -height(RECIPES[r]), r))
    return max(above, key=lambda r: (height(RECIPES[r]), r), default="")
