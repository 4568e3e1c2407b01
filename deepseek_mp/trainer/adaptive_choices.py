"""What each layer may run in while it trains, by the device, the plan and the settings; and its times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepseek_mp.backends.low_precision import formats_of
from deepseek_mp.controller.adaptive_units import AdaptiveUnit
from deepseek_mp.controller.height import height
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.costs.restore import preserved
from deepseek_mp.nn.assign import output_layer, why_not
from deepseek_mp.nn.call import move, parse_batch, run
from deepseek_mp.nn.convert import fp32_arithmetic
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.nn.survey import survey
from deepseek_mp.nn.unit import Unit, multiplies, original_class
from deepseek_mp.precision import RECIPES, PrecisionPlan, Recipe, Rule
from deepseek_mp.precision.kept import kept_bytes
from deepseek_mp.precision.planning import PAYS
from deepseek_mp.profiler.layer_times import LayerCosts, layer_costs

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

CANDIDATES = ("tensor", "row", "block")
BASES = ("bf16", "fp32", "tf32")
"""Regions beside which layers can be lowered one by one; fp16 needs a loss scale that a probe does not have."""
_FP32_KINDS = ("fp32", "tf32")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer that live precision decides on."""

    module: nn.Module
    unit: AdaptiveUnit
    recipe: str
    """What it runs in now."""


def layers_to_control(
    trainer: MixedPrecisionTrainer, settings: AdaptiveSettings, batch: Any
) -> tuple[dict[str, Layer], str]:
    """The layers by name; none, and why, where nothing can be decided."""
    region = trainer.plan.base.region
    if region not in BASES:
        return {}, f"layers are not lowered one by one beside {region}"
    recipes = recipes_asked(trainer, settings)
    low = [recipe for recipe in recipes if _is_low(recipe, region)]
    only_raised = bool(settings.recipes) and len(recipes) > len(low)
    if not low and not only_raised:
        names = settings.recipes or CANDIDATES
        return {}, f"this device multiplies in none of {', '.join(names)}"
    taken = _takers(trainer, recipes)
    if not only_raised and not any(_is_low(RECIPES[name], region) for _, names in taken.values() for name in names):
        return {}, "no layer can be lowered"
    costs = _costs(trainer, batch, recipes)
    found, gains = {}, False
    for name, (module, possible) in taken.items():
        seconds = {recipe: ms / 1e3 for recipe, ms in costs.milliseconds.get(name, {}).items()}
        if region not in seconds:
            seconds = {}
        now = module.unit_precision.recipe.name if isinstance(module, Unit) else region
        if now not in RECIPES or not (RECIPES[now].is_plain or now in possible):
            continue
        paying = tuple(
            own
            for own in possible
            if own == now or not _is_low(RECIPES[own], region) or _pays(settings, seconds, own, region)
        )
        gains |= any(_is_low(RECIPES[own], region) for own in paying)
        unit = AdaptiveUnit(
            macs=float(costs.macs.get(name, 1)), seconds=seconds, recipes=paying, inputs=costs.inputs.get(name, 0)
        )
        if paying:
            found[name] = Layer(module=module, unit=unit, recipe=now)
    if gains or (only_raised and found):
        return found, ""
    lower = ", ".join(recipe.name for recipe in low)
    return {}, f"no layer is {PAYS - 1:.0%} faster in {lower} than in {region}{_closest(costs, region, low, taken)}"


def recipes_asked(trainer: MixedPrecisionTrainer, settings: AdaptiveSettings) -> list[Recipe]:
    """The recipes that layers may leave the region for, on this device and beside the rest of the plan.

    FP32 products are TF32 or not in the whole process, so only one of the two is among them: TF32 where the device has
    it and nothing else of the plan multiplies in FP32.
    """
    region, native = trainer.plan.base.region, trainer.capabilities.matmul_formats
    kind = _fp32_kind(trainer, settings)
    asked = settings.recipes or ("fp32", *CANDIDATES)
    found: dict[str, Recipe] = {}
    for name in asked:
        recipe = RECIPES[kind if name in _FP32_KINDS else name]
        if recipe.name == region or (name in _FP32_KINDS and region in _FP32_KINDS):
            continue
        runs = recipe.is_plain or trainer.config.emulate or formats_of(recipe) <= native
        if runs and (not recipe.is_plain or _runs_plain(trainer, recipe.name)):
            found[recipe.name] = recipe
    return list(found.values())


def _runs_plain(trainer: MixedPrecisionTrainer, format: str) -> bool:
    capabilities = trainer.capabilities
    allowed = capabilities.matmul_formats | (capabilities.emulated_formats if trainer.config.emulate else frozenset())
    return format == "fp32" or format in allowed


def _fp32_kind(trainer: MixedPrecisionTrainer, settings: AdaptiveSettings) -> str:
    """What a product is in that a plan has in FP32: tf32, or fp32 itself."""
    if fp32_arithmetic(trainer.plan) == "tf32":
        return "tf32"
    wants = settings.recipes is None or "tf32" in settings.recipes
    exact = any(
        multiplies(original_class(module)) and trainer.plan.recipe_for(name).region in ("fp32", "hf32")
        for name, module in survey(trainer.model).units.items()
    )
    return "tf32" if wants and not exact and "tf32" in trainer.capabilities.matmul_formats else "fp32"


def _takers(trainer: MixedPrecisionTrainer, recipes: list[Recipe]) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """The layers that multiply and that no rule of the user names, with the recipes that they can run in."""
    found = survey(trainer.model)
    last = output_layer(trainer.model, found)
    mode = trainer.config.precision_mode
    rules = [Rule(pattern=p, recipe=r) for p, r in (trainer.config.pin or {}).items()]  # type: ignore[arg-type]
    rules += mode.rules if isinstance(mode, PrecisionPlan) else ()
    taken = {}
    for name, module in found.units.items():
        if not multiplies(original_class(module)) or any(rule.matches(name) for rule in rules):
            continue
        possible = [r.name for r in recipes if r.is_plain or why_not(r, module, is_output=name == last) is None]
        if possible:
            taken[name] = module, tuple(possible)
    return taken


def _costs(trainer: MixedPrecisionTrainer, batch: Any, recipes: list[Recipe]) -> LayerCosts:
    """Measured times of the layers; with emulation multiply-adds only, since its times mean nothing."""
    call = parse_batch(move(batch, trainer.device))
    region = trainer.stepper.region

    def forward() -> Tensor:
        with region.autocast(cache=False):
            return run(trainer.model, call, trainer.loss_fn).loss

    quiet = trainer.monitor.paused(), torch.compiler.set_stance("force_eager"), maxima_kept(trainer.model)
    with preserved(trainer.model, trainer.device), region.flags(), quiet[0], quiet[1], quiet[2]:
        return layer_costs(
            trainer.model,
            forward,
            [RECIPES[region.format], *recipes],
            trainer.capabilities,
            trainer.device,
            timed=not trainer.config.emulate,
            progress=lambda share: None,
        )


@contextmanager
def maxima_kept(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, delayed scaling has seen nothing of it."""
    found = [amax for scales in scales_of(model) for amax in scales.amax]
    kept = [amax.clone() for amax in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for amax, before in zip(found, kept, strict=True):
                amax.copy_(before)


def _is_low(recipe: Recipe, region: str) -> bool:
    return height(recipe) < height(RECIPES[region])


def _pays(settings: AdaptiveSettings, seconds: Mapping[str, float], recipe: str, region: str) -> bool:
    """Whether the recipe was measured to be faster by a margin, or nothing was; for memory, whether it keeps less."""
    if settings.objective == "memory":
        return kept_bytes(RECIPES[recipe], 8) < kept_bytes(RECIPES[region], 8)
    return not seconds or seconds.get(recipe, math.inf) * PAYS < seconds[region]


def _closest(
    costs: LayerCosts, region: str, low: list[Recipe], taken: Mapping[str, tuple[nn.Module, tuple[str, ...]]]
) -> str:
    """The layer that comes closest to gaining, with its times, in words."""
    lower = {recipe.name for recipe in low}
    ratios = {
        (name, recipe): costs.milliseconds[name][recipe] / costs.milliseconds[name][region]
        for name, (_, recipes) in taken.items()
        for recipe in recipes
        if recipe in lower and {recipe, region} <= costs.milliseconds.get(name, {}).keys()
    }
    if not ratios:
        return ""
    name, recipe = min(ratios, key=ratios.__getitem__)
    times = costs.milliseconds[name]
    return f": {name} comes closest, {times[recipe]:.3f} ms in {recipe} against {times[region]:.3f}"
