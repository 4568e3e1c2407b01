"""Puts a report together: readings, predictions, times, recommendations and reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deepseek_mp.errors import PlanError
from deepseek_mp.nn.assign import why_not
from deepseek_mp.nn.survey import Survey
from deepseek_mp.nn.unit import multiplies, original_class
from deepseek_mp.precision import RECIPES, Operand, Recipe, Role
from deepseek_mp.precision.kept import kept_bytes
from deepseek_mp.profiler.layer_times import LayerCosts
from deepseek_mp.profiler.partial import Partial
from deepseek_mp.profiler.report import ProfileReport, Verification
from deepseek_mp.profiler.unit_profile import FAMILIES, UnitProfile, family_of
from deepseek_mp.profiler.verification import TrueChange, rank_correlation
from deepseek_mp.profiler.without_data import output_errors
from deepseek_mp.sensitivity.prediction import Predictor

NOT_MULTIPLYING = "no matrix product of its own: it follows the plan's region, which keeps its sums in FP32"


def without_data(found: Survey, recipes: Sequence[Recipe], base: Recipe) -> ProfileReport:
    """The report of weights and shapes alone."""
    units = {}
    for name, module in found.units.items():
        errors = output_errors(module, recipes)
        reason = (
            "by weights and shapes alone; what an error of the output does to the loss, only batches tell"
            if errors
            else NOT_MULTIPLYING
        )
        own = {"recommended": base.name, "reason": reason, "not_analysed": None}
        units[name] = UnitProfile({**_description(module), **_worst(module, recipes, errors), **own})
    return ProfileReport({**units, **_uncontrollable(found, base)}, basis="weights", base=base.name, recipes=recipes)


def assemble(
    found: Survey,
    partial: Partial,
    recipes: Sequence[Recipe],
    base: Recipe,
    costs: LayerCosts,
    *,
    native: Sequence[str],
) -> ProfileReport:
    """The report of the batches; nothing is recommended yet."""
    predictor = Predictor(partial.readings, partial.loss, curvature=partial.curvature)
    by_name = {recipe.name: recipe for recipe in recipes}
    units = {}
    for name, module in found.units.items():
        why = None if name in partial.readings else partial.unmeasured.get(name, "it was not called")
        values: dict[str, Any] = {**_description(module), "not_analysed": why}
        if why is None:
            values |= _measured(name, module, predictor, by_name)
        if multiplies(original_class(module)):
            values |= _costs(name, costs, base, by_name)
        reason = f"not analysed: {why}" if why else NOT_MULTIPLYING
        units[name] = UnitProfile({**values, "recommended": base.name, "reason": reason})
    return ProfileReport(
        {**units, **_uncontrollable(found, base)},
        basis="batches",
        base=base.name,
        recipes=recipes,
        batches=partial.counted,
        loss=partial.loss,
        skipped=partial.skipped,
        native=native,
    )


def with_recommendations(report: ProfileReport) -> ProfileReport:
    """The report with what the default budgets lead to."""
    try:
        return report.with_plan(report.plan())
    except PlanError as error:
        return report.replaced({n: u.with_values(reason=str(error)) for n, u in report.items() if "macs" in u})


def with_verification(
    report: ProfileReport, changes: Mapping[str, Mapping[str, TrueChange]], *, held_out: bool
) -> ProfileReport:
    """The report with true changes beside the predicted ones."""
    predicted, true, changed = [], [], {}
    for name, by_recipe in changes.items():
        errors = {recipe: change.standard_error for recipe, change in by_recipe.items()}
        means = {recipe: change.mean for recipe, change in by_recipe.items()}
        changed[name] = report[name].with_values(true_change=means, true_error=errors)
        for recipe, change in by_recipe.items():
            value = report[name]["recipes"][recipe]["loss"]
            if math.isfinite(value) and math.isfinite(change.mean):
                predicted.append(value)
                true.append(abs(change.mean))
    made = report.replaced(changed)
    made.verification = Verification(
        pairs=len(true),
        plain=sum(change.is_plain for by_recipe in changes.values() for change in by_recipe.values()),
        rank_correlation=rank_correlation(predicted, true),
        held_out=held_out,
    )
    return made


def _description(module: nn.Module) -> dict[str, Any]:
    weight = module._parameters.get("weight")  # noqa: SLF001
    return {
        "kind": original_class(module).__name__,
        "parameters": sum(p.numel() for p in module._parameters.values() if p is not None),  # noqa: SLF001
        "shape": None if weight is None else list(weight.shape),
    }


def _measured(name: str, module: nn.Module, predictor: Predictor, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    reading = predictor.readings[name]
    losses, details = {}, {}
    for recipe_name, effect in reading.effects.items():
        recipe = recipes[recipe_name]
        losses[recipe_name] = predictor.loss(name, recipe)
        details[recipe_name] = {
            "loss": losses[recipe_name],
            "first": effect.first,
            "standard_error": effect.standard_error,
            "second": effect.second,
            "noise": {role.value: predictor.noise(name, recipe, role) for role in Role},
            "errors": effect.to_json()["errors"],
            "taken": _takes(module, recipe),
            "not_taken": _not_taken(module, recipe),
        }
    spreads = {operand.value: dict(reading.spreads[operand]) for operand in Operand}
    return {**_worst(module, list(recipes.values()), losses), "recipes": details, "spreads": spreads}


def _takes(module: nn.Module, recipe: Recipe) -> bool:
    """Whether the unit can run in the recipe: its kind, and for scaled ones its sizes."""
    return _not_taken(module, recipe) is None


def _not_taken(module: nn.Module, recipe: Recipe) -> str | None:
    """Why the unit cannot run in the recipe, or None."""
    found = None if recipe.is_plain else why_not(recipe, module, is_output=False)
    return None if found is None else found[1]


def _worst(module: nn.Module, recipes: Sequence[Recipe], losses: Mapping[str, float]) -> dict[str, float]:
    """`<family>_loss` of each family that was asked for: the worst of the recipes the unit takes, else of all."""
    found: dict[str, float] = {}
    for family in FAMILIES:
        members = [r for r in recipes if family_of(r.name) == family and r.name in losses]
        taken = [r for r in members if _takes(module, r)] or members
        if taken:
            found[f"{family}_loss"] = max(losses[r.name] for r in taken)
    return found


def _costs(name: str, costs: LayerCosts, base: Recipe, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    if name not in costs.macs:
        return {}
    saved = {
        recipe.name: kept_bytes(base, costs.inputs[name]) - kept_bytes(recipe, costs.inputs[name])
        for recipe in (RECIPES["fp32"], *recipes.values())
    }
    return {
        "macs": costs.macs[name],
        "milliseconds": dict(costs.milliseconds.get(name, {})),
        "saved_bytes": saved,
    }


def _uncontrollable(found: Survey, base: Recipe) -> dict[str, UnitProfile]:
    return {
        name: UnitProfile(
            {
                "kind": "module",
                "parameters": 0,
                "shape": None,
                "recommended": base.name,
                "reason": f"not analysed: {why}",
                "not_analysed": why,
            }
        )
        for name, why in found.uncontrollable.items()
    }
