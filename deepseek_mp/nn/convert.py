"""The one place that converts a user's model: a plan is applied in place, and taken back exactly.

`apply` first checks everything that could refuse the plan, then changes classes (once), the units'
data and the memory format of convolutions. Between the two nothing can fail, so a refused plan leaves
the model as it was. The plan in force is kept on the model it was applied to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from deepseek_mp.backends import Capabilities
from deepseek_mp.errors import PlanError, explain
from deepseek_mp.nn import checks
from deepseek_mp.nn.checks import unit_format
from deepseek_mp.nn.layout import laid_out, memory_format_of, original_strides, restored
from deepseek_mp.nn.survey import Survey, survey, uncontrollable, units
from deepseek_mp.nn.unit import NARROW_FORMATS, Unit, UnitPrecision, multiplies, original_class, unit_class
from deepseek_mp.ops.dtypes import format_of
from deepseek_mp.precision import Decision, PrecisionPlan, Reason, Recipe

__all__ = ["apply", "convert", "current_plan", "fp32_arithmetic", "revert", "uncontrollable", "units"]

_PLAN = "precision_plan_in_force"
_PRECISION = "unit_precision"
# Reasons that follow from the plan and the model; all others were measured and are kept.
_DERIVED = (Reason.PINNED, Reason.REQUESTED, Reason.EMULATED, Reason.NOT_CONTROLLABLE)


def apply(
    model: nn.Module,
    plan: PrecisionPlan | str,
    *,
    emulate: bool = False,
    capabilities: Capabilities | None = None,
) -> PrecisionPlan:
    """Put the plan in force, in place, and return it with one `Decision` per layer.

    A name stands for the plan of that base with the memory format the model has now. Applying a
    plan again, or another one, replaces the units' data only. `capabilities` are those of the
    model's device unless given.

    Raises `PlanError` if the plan does not fit the model and `FormatError` if the device lacks one
    of its formats and `emulate` is false; the model is then as it was.
    """
    if not isinstance(plan, PrecisionPlan):
        plan = replace(PrecisionPlan.of(plan), memory_format=memory_format_of(model))
    checks.check_model(model)
    found = survey(model)
    checks.check_rules(plan, found)
    checks.check_parameters(model, plan, found)
    checks.check_fp32_arithmetic(plan, found)
    emulated = checks.check_devices(model, plan, capabilities, emulate=emulate)

    resolved = replace(plan, decisions=tuple(_decisions(model, plan, found, emulated)))
    changes = [
        (module, unit_class(original_class(module)), _precision(plan.recipe_for(name), module, plan))
        for name, module in found.units.items()
    ]
    # Units of an earlier call that something took out of our hands since then: they follow the base.
    controlled = set(found.units.values())
    lost = [module for module in model.modules() if isinstance(module, Unit) and module not in controlled]
    changes += [(module, type(module), _precision(plan.base, module, plan)) for module in lost]
    layouts = laid_out(found.units.values(), plan.memory_format)

    for module, kind, precision in changes:
        module.__dict__[_PRECISION] = precision
        module.__class__ = kind
    for weight, data in layouts:
        weight.data = data
    for module in model.modules():
        module.__dict__.pop(_PLAN, None)  # a plan of a part is not in force any more
    model.__dict__[_PLAN] = resolved
    return resolved


def convert(
    model: nn.Module,
    plan: PrecisionPlan | str,
    *,
    emulate: bool = False,
    capabilities: Capabilities | None = None,
) -> PrecisionPlan:
    """Apply a plan, or a format by its name, to the model in place; see `apply`."""
    return apply(model, plan, emulate=emulate, capabilities=capabilities)


def revert(model: nn.Module) -> None:
    """Take the conversion back: original classes, strides, and no attribute left. Values stay."""
    converted = {name: module for name, module in model.named_modules() if isinstance(module, Unit)}
    for name, unit in converted.items():
        if type(unit) is not unit_class(unit.original_class):
            raise PlanError(
                explain(
                    f"the class of unit {name!r} was changed to {type(unit)} after its conversion",
                    "units whose class is as `apply` left it",
                    "Undo that change first (remove_parametrizations, for one)",
                )
            )
    layouts = restored(converted.values())

    for weight, data in layouts:
        weight.data = data
    for unit in converted.values():
        del unit.__dict__[_PRECISION]
        unit.__class__ = unit.original_class  # type: ignore[assignment]
    for module in model.modules():
        module.__dict__.pop(_PLAN, None)


def current_plan(model: nn.Module) -> PrecisionPlan | None:
    """The resolved plan in force on this model, or None. Ask the module it was applied to."""
    plan = model.__dict__.get(_PLAN)
    assert plan is None or isinstance(plan, PrecisionPlan)
    return plan


def fp32_arithmetic(plan: PrecisionPlan) -> Literal["ieee", "tf32", "hf32"]:
    """What FP32 products must be while this plan is in force: a setting of the whole process."""
    formats = {unit_format(recipe) for recipe in (plan.base, *(rule.recipe for rule in plan.rules))}
    if "tf32" in formats:
        return "tf32"
    return "hf32" if "hf32" in formats else "ieee"


def _precision(recipe: Recipe, module: nn.Module, plan: PrecisionPlan) -> UnitPrecision:
    return UnitPrecision.of(unit_format(recipe), unit_format(plan.base), recipe, original_strides(module))


def _decisions(model: nn.Module, plan: PrecisionPlan, found: Survey, emulated: frozenset[str]) -> Iterator[Decision]:
    """The plan's decisions about the whole run, then one for each layer in the model's order."""
    given = {decision.layer: decision for decision in plan.decisions if decision.role is None}
    shared = _sharing(found)
    if "" in given and "" not in found.names:
        yield given[""]
    for name, module in model.named_modules():
        if name in found.uncontrollable:
            yield Decision(
                layer=name,
                old=_format_now(model, module),
                new=plan.base.name,
                reason=Reason.NOT_CONTROLLABLE,
                detail=found.uncontrollable[name],
            )
        elif name in found.units:
            details = [found.notes.get(name, ""), _sharing_note(name, shared, plan), _kernel_note(name, module, plan)]
            detail = "; ".join(filter(None, details))
            yield _decision(name, _format_now(model, module), plan, given.get(name), detail, emulated)


def _decision(
    name: str, old: str, plan: PrecisionPlan, given: Decision | None, detail: str, emulated: frozenset[str]
) -> Decision:
    recipe = plan.recipe_for(name)
    if unit_format(recipe) in emulated:
        return Decision(layer=name, old=old, new=recipe.name, reason=Reason.EMULATED, detail=detail)
    if given is not None and given.new == recipe.name and given.reason not in _DERIVED:
        return replace(given, old=old, detail=given.detail or detail)
    reason = Reason.REQUESTED if plan.rule_for(name) is None else Reason.PINNED
    return Decision(layer=name, old=old, new=recipe.name, reason=reason, detail=detail)


def _format_now(model: nn.Module, module: nn.Module) -> str:
    """The recipe the module runs in before the change; of an unconverted one the format it is stored in."""
    if isinstance(module, Unit):
        return module.unit_precision.recipe.name
    before = current_plan(model)
    if before is not None:
        return before.base.name
    stored = next((p.dtype for p in module._parameters.values() if p is not None), torch.float32)  # noqa: SLF001
    return format_of(stored) if stored.is_floating_point else str(stored).removeprefix("torch.")


def _sharing(found: Survey) -> dict[str, list[str]]:
    """For each unit, the other units that use one of its parameters."""
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in found.units.items():
        for parameter in module._parameters.values():  # noqa: SLF001
            if parameter is not None:
                users[id(parameter)].append(name)
    others: dict[str, list[str]] = defaultdict(list)
    for names in users.values():
        for name in names:
            others[name] += [other for other in names if other != name]
    return others


def _sharing_note(name: str, shared: dict[str, list[str]], plan: PrecisionPlan) -> str:
    uses = [f"{other!r} ({plan.recipe_for(other).name})" for other in dict.fromkeys(shared.get(name, ()))]
    return f"shares its weight with {', '.join(uses)}, each casts its own copy" if uses else ""


def _kernel_note(name: str, module: nn.Module, plan: PrecisionPlan) -> str:
    """Said of norms, embeddings and the like, where a narrow region may change nothing."""
    if unit_format(plan.recipe_for(name)) not in NARROW_FORMATS or multiplies(original_class(module)):
        return ""
    return "no matrix product, so autocast's own list decides what runs"
