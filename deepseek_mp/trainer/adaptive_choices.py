"""The layers that live precision decides on: what each may be lowered to, and its measured times."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepseek_mp.backends.low_precision import formats_of
from deepseek_mp.controller.adaptive import AdaptiveUnit
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.costs.restore import preserved
from deepseek_mp.nn.assign import output_layer, why_not
from deepseek_mp.nn.call import move, parse_batch, run
from deepseek_mp.nn.delayed import maxima_kept
from deepseek_mp.nn.survey import survey
from deepseek_mp.nn.unit import Unit, multiplies, original_class
from deepseek_mp.precision import RECIPES, PrecisionPlan, Recipe, Rule
from deepseek_mp.precision.planning import PAYS
from deepseek_mp.profiler.layer_times import SECONDS, LayerCosts, layer_costs
from deepseek_mp.trainer.auto import scaled_recipe

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

CANDIDATES = ("tensor", "row", "block")
BASES = ("bf16", "fp32", "tf32")
"""Regions beside which layers can be lowered one by one; fp16 needs a loss scale that a probe does not have."""

Takers = Mapping[str, tuple[nn.Module, tuple[str, ...]]]
"""By layer, its module and the recipes that it can take."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer that live precision decides on."""

    module: nn.Module
    unit: AdaptiveUnit
    recipe: str
    """What it runs in now."""


def layers_to_control(
    trainer: MixedPrecisionTrainer, settings: AdaptiveSettings, costs_of: Callable[[Sequence[Recipe]], LayerCosts]
) -> tuple[dict[str, Layer], str]:
    """The layers by name; none, and why, where nothing can be decided.

    With 'auto' and no recipes named, the one that 'auto' timed is the only one, so that nothing has to be timed again.
    `costs_of` is asked last: where nothing can be decided anyway nothing is measured.
    """
    region, auto = trainer.plan.base.region, follows_auto(trainer, settings)
    if region not in BASES:
        return {}, f"layers are not lowered one by one beside {region}"
    recipes = _recipes(trainer, settings)
    if not recipes and auto:
        return {}, "this device has no FP8 recipe of its own that 'auto' could time"
    if not recipes:
        return {}, f"this device multiplies in none of {', '.join(settings.recipes or CANDIDATES)}"
    if auto and region != "bf16":
        return {}, f"'auto' found nothing faster than {region}"
    taken = _takers(trainer, recipes)
    if not taken:
        return {}, "no layer can be lowered"
    costs = costs_of(recipes)
    layers = _paying(taken, costs, region, timed=_is_timed(trainer, recipes))
    if not layers:
        named = ", ".join(recipe.name for recipe in recipes)
        return {}, f"no layer is {PAYS - 1:.0%} faster in {named} than in {region}{_closest(costs, region, taken)}"
    return layers, ""


def follows_auto(trainer: MixedPrecisionTrainer, settings: AdaptiveSettings) -> bool:
    """Whether what 'auto' measured is all there is to decide among."""
    return trainer.config.precision_mode == "auto" and settings.recipes is None


def _now(module: nn.Module, region: str) -> str:
    return module.unit_precision.recipe.name if isinstance(module, Unit) else region


def _recipes(trainer: MixedPrecisionTrainer, settings: AdaptiveSettings) -> list[Recipe]:
    """What layers may be lowered to on this device."""
    if follows_auto(trainer, settings):
        found = scaled_recipe(trainer.capabilities, trainer.config.kernels)
        return [] if found is None else [found]
    native = trainer.capabilities.matmul_formats
    asked = [RECIPES[name] for name in settings.recipes or CANDIDATES]
    return [recipe for recipe in asked if trainer.config.emulate or formats_of(recipe) <= native]


def _takers(trainer: MixedPrecisionTrainer, recipes: Sequence[Recipe]) -> Takers:
    """The layers that can be lowered, and to what; none that a pin or a rule of the user names."""
    found = survey(trainer.model)
    last = output_layer(trainer.model, found)
    mode = trainer.config.precision_mode
    rules = [Rule(pattern=p, recipe=r) for p, r in (trainer.config.pin or {}).items()]  # type: ignore[arg-type]
    rules += mode.rules if isinstance(mode, PrecisionPlan) else ()
    taken = {}
    for name, module in found.units.items():
        if not multiplies(original_class(module)) or any(rule.matches(name) for rule in rules):
            continue
        takes = [r.name for r in recipes if why_not(r, module, is_output=name == last) is None]
        if takes:
            taken[name] = module, tuple(takes)
    return taken


def _is_timed(trainer: MixedPrecisionTrainer, recipes: Sequence[Recipe]) -> bool:
    """Whether times mean anything: not where a recipe is emulated."""
    return all(formats_of(recipe) <= trainer.capabilities.matmul_formats for recipe in recipes)


def _paying(taken: Takers, costs: LayerCosts, region: str, *, timed: bool) -> dict[str, Layer]:
    """Each layer with the recipes that make it faster; without times all that it takes."""
    layers = {}
    for name, (module, recipes) in taken.items():
        seconds = {recipe: ms / 1e3 for recipe, ms in costs.milliseconds.get(name, {}).items()}
        now = _now(module, region)
        if region not in seconds:
            seconds = {}
        known = now in RECIPES and (RECIPES[now].is_plain or now in recipes)
        paying = tuple(r for r in recipes if r == now or not timed or _pays(seconds, r, region)) if known else ()
        if paying:
            unit = AdaptiveUnit(macs=float(costs.macs.get(name, 1)), seconds=seconds, recipes=paying)
            layers[name] = Layer(module=module, unit=unit, recipe=now)
    return layers


def _pays(seconds: Mapping[str, float], recipe: str, region: str) -> bool:
    """Whether the recipe was measured to be faster by a margin."""
    return seconds.get(recipe, math.inf) * PAYS < seconds.get(region, 0.0)


def measured_costs(
    trainer: MixedPrecisionTrainer, settings: AdaptiveSettings, batch: Any, recipes: Sequence[Recipe]
) -> LayerCosts:
    """Measured times of the layers; multiply-adds only where times mean nothing.

    What 'auto' timed is in the cache of costs. Only where it has left nothing there, as when its plan comes from a
    checkpoint, layers are timed now.
    """
    call = parse_batch(move(batch, trainer.device))
    region, timed = trainer.stepper.region, _is_timed(trainer, recipes)

    def forward() -> Tensor:
        with region.autocast(cache=False):
            return run(trainer.model, call, trainer.loss_fn).loss

    def measured(budget_s: float) -> LayerCosts:
        quiet = trainer.monitor.paused(), torch.compiler.set_stance("force_eager"), maxima_kept(trainer.model)
        with preserved(trainer.model, trainer.device), region.flags(), quiet[0], quiet[1], quiet[2]:
            return layer_costs(
                trainer.model,
                forward,
                [RECIPES[region.format], *recipes],
                trainer.capabilities,
                trainer.device,
                timed=timed,
                progress=lambda share: None,
                cache=trainer.costs,
                budget_s=budget_s,
                kernels=trainer.config.kernels,
                memory_format=trainer.plan.memory_format,
            )

    if timed and follows_auto(trainer, settings):
        found = measured(0.0)
        if found.milliseconds:
            return found
    return measured(SECONDS)


def _closest(costs: LayerCosts, region: str, taken: Takers) -> str:
    """The layer that comes closest to gaining, with its times, in words."""
    ratios = {
        (name, recipe): costs.milliseconds[name][recipe] / costs.milliseconds[name][region]
        for name, (_, recipes) in taken.items()
        for recipe in recipes
        if {recipe, region} <= costs.milliseconds.get(name, {}).keys()
    }
    if not ratios:
        return ""
    name, recipe = min(ratios, key=ratios.__getitem__)
    times = costs.milliseconds[name]
    return f": {name} comes closest, {times[recipe]:.3f} ms in {recipe} against {times[region]:.3f}"
