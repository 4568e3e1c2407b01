"""What each layer may run in while it trains, by the device, the plan and the settings; and its times."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from deepseek_mp.nn.delayed import maxima_kept
from deepseek_mp.nn.survey import survey
from deepseek_mp.nn.unit import Unit, multiplies, original_class
from deepseek_mp.precision import RECIPES, PrecisionPlan, Recipe, Rule
from deepseek_mp.precision.kept import kept_bytes
from deepseek_mp.precision.planning import PAYS
from deepseek_mp.profiler.layer_times import SECONDS, LayerCosts, layer_costs
from deepseek_mp.trainer.auto import scaled_recipe
from deepseek_mp.trainer.compile import repeated_blocks

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

CANDIDATES = ("tensor", "row", "block")
BASES = ("bf16", "fp32", "tf32")
"""Regions beside which layers can be lowered one by one; fp16 needs a loss scale that a probe does not have."""
_FP32_KINDS = ("fp32", "tf32")

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

    With 'auto' and no recipes named, the one that 'auto' timed is the only low one, so that nothing has to be timed
    again. `costs_of` is asked last: where nothing can be decided anyway nothing is measured.
    """
    region, auto = trainer.plan.base.region, follows_auto(trainer, settings)
    if region not in BASES:
        return {}, f"layers are not lowered one by one beside {region}"
    recipes = recipes_asked(trainer, settings)
    low = [recipe for recipe in recipes if _is_low(recipe, region)]
    only_raised = bool(settings.recipes) and len(recipes) > len(low)
    if not low and not only_raised:
        return {}, _why_nothing_is_low(trainer, settings, recipes)
    if auto and region != "bf16":
        return {}, f"'auto' found nothing faster than {region}"
    free = _free_layers(trainer)
    if not free:
        multiply = any(multiplies(original_class(module)) for module in survey(trainer.model).units.values())
        return {}, "every layer is pinned or named by the plan" if multiply else "no layer multiplies matrices"
    taken = _takers(trainer, free, recipes)
    if not only_raised and not any(_is_low(RECIPES[name], region) for _, names in taken.values() for name in names):
        return {}, "no layer can be lowered"
    costs = costs_of(recipes)
    found = _worth_it(taken, costs, region, settings, timed=_is_timed(trainer, low))
    found = _in_blocks(trainer, found)
    gains = any(_is_low(RECIPES[name], region) for layer in found.values() for name in layer.unit.recipes)
    if gains or (only_raised and found):
        return found, ""
    lower = ", ".join(recipe.name for recipe in low)
    return {}, f"no layer is {PAYS - 1:.0%} faster in {lower} than in {region}{_closest(costs, region, low, taken)}"


def _in_blocks(trainer: MixedPrecisionTrainer, layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers, each with the block that it is compiled in."""
    if trainer.config.compile != "regional":
        return layers
    blocks = {module: block for block in repeated_blocks(trainer.model) for module in block.modules()}
    names = {module: name for name, module in trainer.model.named_modules()}
    return {
        name: replace(layer, unit=replace(layer.unit, block=names.get(blocks.get(layer.module), "")))
        for name, layer in layers.items()
    }


def _why_nothing_is_low(trainer: MixedPrecisionTrainer, settings: AdaptiveSettings, recipes: list[Recipe]) -> str:
    """Why no recipe below the region is left: none was asked for, or the device has none of those that were."""
    region = trainer.plan.base.region
    if follows_auto(trainer, settings):
        hint = "; name recipes= to emulate one" if trainer.config.emulate else ""
        return f"this device has no FP8 recipe of its own that 'auto' could time{hint}"
    if settings.recipes and not recipes and all(_is_own(name, region) for name in settings.recipes):
        return f"nothing beside the region, {region}, was asked for"
    return f"this device multiplies in none of {', '.join(settings.recipes or CANDIDATES)}"


def _is_own(name: str, region: str) -> bool:
    """Whether the recipe is the region's own, or its FP32 of the other kind."""
    return name == region or (name in _FP32_KINDS and region in _FP32_KINDS)


def _worth_it(
    taken: Takers, costs: LayerCosts, region: str, settings: AdaptiveSettings, *, timed: bool
) -> dict[str, Layer]:
    """Each layer with the recipes above the region, and those below it that gain what lowering is for."""
    found = {}
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
            if own == now or not _is_low(RECIPES[own], region) or _pays(settings, seconds, own, region, timed=timed)
        )
        unit = AdaptiveUnit(
            macs=float(costs.macs.get(name, 1)), seconds=seconds, recipes=paying, inputs=costs.inputs.get(name, 0)
        )
        if paying:
            found[name] = Layer(module=module, unit=unit, recipe=now)
    return found


def follows_auto(trainer: MixedPrecisionTrainer, settings: AdaptiveSettings) -> bool:
    """Whether what 'auto' measured is all there is to decide among."""
    return trainer.config.precision_mode == "auto" and settings.recipes is None


def recipes_asked(trainer: MixedPrecisionTrainer, settings: AdaptiveSettings) -> list[Recipe]:
    """The recipes that layers may leave the region for, on this device and beside the rest of the plan.

    FP32 products are TF32 or not in the whole process, so only one of the two is among them: TF32 where the device has
    it and nothing else of the plan multiplies in FP32.
    """
    region, native = trainer.plan.base.region, trainer.capabilities.matmul_formats
    kind = _fp32_kind(trainer, settings)
    asked = settings.recipes or ("fp32", *CANDIDATES)
    if follows_auto(trainer, settings):
        timed = scaled_recipe(trainer.capabilities, trainer.config.kernels)
        asked = ("fp32",) if timed is None else ("fp32", timed.name)
    found: dict[str, Recipe] = {}
    for name in asked:
        recipe = RECIPES[kind if name in _FP32_KINDS else name]
        if _is_own(recipe.name, region):
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


def _free_layers(trainer: MixedPrecisionTrainer) -> dict[str, nn.Module]:
    """The layers that multiply and that no rule of the user names."""
    mode = trainer.config.precision_mode
    rules = [Rule(pattern=p, recipe=r) for p, r in (trainer.config.pin or {}).items()]  # type: ignore[arg-type]
    rules += mode.rules if isinstance(mode, PrecisionPlan) else ()
    return {
        name: module
        for name, module in survey(trainer.model).units.items()
        if multiplies(original_class(module)) and not any(rule.matches(name) for rule in rules)
    }


def _takers(trainer: MixedPrecisionTrainer, free: Mapping[str, nn.Module], recipes: list[Recipe]) -> Takers:
    """Those of the layers that can run in some of the recipes, with these."""
    last = output_layer(trainer.model, survey(trainer.model))
    taken = {}
    for name, module in free.items():
        possible = [r for r in recipes if r.is_plain or why_not(r, module, is_output=name == last) is None]
        if _is_frozen_narrow(module):
            possible = [recipe for recipe in possible if recipe.region == "bf16"]
        if possible:
            taken[name] = module, tuple(recipe.name for recipe in possible)
    return taken


def _is_frozen_narrow(module: nn.Module) -> bool:
    """Whether weights that are not trained lie there in BF16: no other region reads them."""
    own = (p for p in module._parameters.values() if p is not None)  # noqa: SLF001
    return any(p.dtype == torch.bfloat16 and not p.requires_grad for p in own)


def _is_timed(trainer: MixedPrecisionTrainer, recipes: Sequence[Recipe]) -> bool:
    """Whether times mean anything: not where a recipe is emulated."""
    return all(formats_of(recipe) <= trainer.capabilities.matmul_formats for recipe in recipes)


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


def _is_low(recipe: Recipe, region: str) -> bool:
    return height(recipe) < height(RECIPES[region])


def _pays(settings: AdaptiveSettings, seconds: Mapping[str, float], recipe: str, region: str, *, timed: bool) -> bool:
    """Whether the recipe was measured to be faster by a margin; for memory, whether it keeps less.

    Where times mean nothing all recipes do; where they do, what was not timed does not.
    """
    if settings.objective == "memory":
        return kept_bytes(RECIPES[recipe], 8) < kept_bytes(RECIPES[region], 8)
    return not timed or seconds.get(recipe, math.inf) * PAYS < seconds.get(region, 0.0)


def _closest(costs: LayerCosts, region: str, low: list[Recipe], taken: Takers) -> str:
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
