"""The one place that converts a user's model: a plan is applied in place, and taken back exactly.

`prepare` does everything that could refuse the plan and changes nothing. Then `apply` changes classes
(once), the units' data and the memory format of convolutions; between the two nothing can fail, so a
refused plan leaves the model as it was. The plan in force is kept on the model it was applied to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from deepseek_mp.backends import Capabilities
from deepseek_mp.errors import ConfigError, PlanError, explain
from deepseek_mp.nn import checks
from deepseek_mp.nn.assign import Assigned, around, assign, devices_of, for_device
from deepseek_mp.nn.decisions import decisions
from deepseek_mp.nn.delayed import drop_scales, place_scales
from deepseek_mp.nn.layout import laid_out, memory_format_of, original_strides, restored
from deepseek_mp.nn.survey import Survey, survey, uncontrollable, units
from deepseek_mp.nn.unit import Unit, UnitPrecision, original_class, unit_class
from deepseek_mp.precision import PrecisionPlan

__all__ = [
    "apply",
    "convert",
    "current_plan",
    "fp32_arithmetic",
    "kernels_in_force",
    "revert",
    "uncontrollable",
    "unconverted",
    "units",
]

_PLAN = "precision_plan_in_force"
_KERNELS = "precision_kernels_in_force"
IN_FORCE = (_PLAN, _KERNELS)
"""Attributes of a converted model."""
_PRECISION = "unit_precision"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A plan that the model takes, and what each unit gets by it."""

    plan: PrecisionPlan
    """For this device, with its decisions."""
    found: Survey
    assigned: Mapping[str, Assigned]


def prepare(
    model: nn.Module,
    plan: PrecisionPlan | str,
    *,
    emulate: bool = False,
    kernels: str | None = None,
    capabilities: Capabilities | None = None,
) -> Prepared:
    """Everything that can refuse the plan; see `apply`. The model does not change."""
    _check_module(model)
    checks.check_kernels(kernels)
    if not isinstance(plan, PrecisionPlan):
        plan = replace(PrecisionPlan.of(plan), memory_format=memory_format_of(model))
    checks.check_model(model)
    found = survey(model)
    devices = devices_of(model, capabilities)
    plan = for_device(plan, devices)
    checks.check_recipes(plan, emulate=emulate)
    checks.check_rules(plan, found)
    checks.check_parameters(model, plan, found)
    checks.check_fp32_arithmetic(plan, found)
    emulated = checks.check_devices(plan, devices, emulate=emulate, kernels=kernels)
    assigned = assign(model, plan, found, device=devices[0], emulated=emulated, emulate=emulate, kernels=kernels)
    decided = decisions(model, plan, found, assigned, before=current_plan(model), emulated=emulated)
    return Prepared(plan=replace(plan, decisions=tuple(decided)), found=found, assigned=assigned)


def apply(
    model: nn.Module,
    plan: PrecisionPlan | str,
    *,
    emulate: bool = False,
    kernels: str | None = None,
    capabilities: Capabilities | None = None,
) -> PrecisionPlan:
    """Put the plan in force, in place, and return it with one `Decision` per layer.

    A name stands for the plan of that base with the memory format the model has now. Applying a
    plan again, or another one, replaces the units' data only. `capabilities` are those of the
    model's device unless given. The recipe 'fp8' becomes the device's best one.

    `kernels` names the implementation of FP8 products and casts ('reference', 'triton', 'native'): it is
    used or refused. None takes the best that the device has. Which one runs is in each decision's evidence.

    Raises `PlanError` if the plan does not fit the model and `FormatError` if the device lacks one
    of its formats and `emulate` is false; the model is then as it was.
    """
    prepared = prepare(model, plan, emulate=emulate, kernels=kernels, capabilities=capabilities)
    resolved, found = prepared.plan, prepared.found
    if not resolved.base.is_plain and not any(unit.products or unit.rounds for unit in prepared.assigned.values()):
        warnings.warn(f"no layer of this model runs in {resolved.base.name}; the decisions say why", stacklevel=2)
    base = resolved.base.region
    changes: list[tuple[nn.Module, type[nn.Module], UnitPrecision]] = []
    for name, module in found.units.items():
        unit = prepared.assigned[name]
        strides = original_strides(module)
        precision = UnitPrecision.of(unit.recipe, base, strides, unit.products, rounds=unit.rounds)
        changes.append((module, unit_class(original_class(module)), precision))
    # Units of an earlier call that something took out of our hands since then: they follow the base.
    controlled = set(found.units.values())
    lost = [module for module in model.modules() if isinstance(module, Unit) and module not in controlled]
    follow = around(resolved.base)
    changes += [(module, type(module), UnitPrecision.of(follow, base, original_strides(module))) for module in lost]
    layouts = laid_out(found.units.values(), resolved.memory_format)

    for module, kind, precision in changes:
        module.__dict__[_PRECISION] = precision
        module.__class__ = kind
    for weight, data in layouts:
        weight.data = data
    _forget_plans(model)
    model.__dict__.update({_PLAN: resolved, _KERNELS: kernels})
    place_scales(model)
    return resolved


def convert(
    model: nn.Module,
    plan: PrecisionPlan | str,
    *,
    emulate: bool = False,
    kernels: str | None = None,
    capabilities: Capabilities | None = None,
) -> PrecisionPlan:
    """Apply a plan, or a recipe by its name, to the model in place; `revert` takes it back.

    Layers then run in their formats inside `autocast(device, plan.base.region)`. Weights stay in FP32, hooks and names
    as they are. Converting again replaces the plan.

    Args:
        model: any module; its device decides which formats there are.
        plan: a `PrecisionPlan`, or the name of a recipe for all layers, such as 'bf16' or 'fp8'.
        emulate: allow formats that the device has no units for, where PyTorch can run them.
        kernels: what runs FP8 ('reference', 'triton', 'native'), used or refused; None: the best there is.
        capabilities: of the device; None: as they are found.

    Returns:
        The plan in force, with a `Decision` for each layer: what it runs in, and why.

    Raises:
        ConfigError: no module.
        PlanError: the plan does not fit the model.
        FormatError: the device lacks one of the formats and `emulate` is false. The model is then as it was.
    """
    return apply(model, plan, emulate=emulate, kernels=kernels, capabilities=capabilities)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(explain(f"a model of type {type(model).__name__}", "a torch.nn.Module", "Pass the model"))


def revert(model: nn.Module) -> None:
    """Take the conversion back: original classes, strides, and no attribute left. Values stay."""
    _check_module(model)
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

    drop_scales(model)
    for weight, data in layouts:
        weight.data = data
    for unit in converted.values():
        del unit.__dict__[_PRECISION]
        unit.__class__ = unit.original_class  # type: ignore[assignment]
    _forget_plans(model)


def current_plan(model: nn.Module) -> PrecisionPlan | None:
    """The resolved plan in force on this model, or None. Ask the module it was applied to."""
    plan = model.__dict__.get(_PLAN)
    assert plan is None or isinstance(plan, PrecisionPlan)
    return plan


def kernels_in_force(model: nn.Module) -> str | None:
    """The implementation that was asked for when the plan in force was applied; None: the best there is."""
    kernels = model.__dict__.get(_KERNELS)
    assert kernels is None or isinstance(kernels, str)
    return kernels


def fp32_arithmetic(plan: PrecisionPlan) -> Literal["ieee", "tf32", "hf32"]:
    """What FP32 products must be while this plan is in force: a setting of the whole process."""
    formats = {recipe.region for recipe in (plan.base, *(rule.recipe for rule in plan.rules))}
    if "tf32" in formats:
        return "tf32"
    return "hf32" if "hf32" in formats else "ieee"


def _forget_plans(model: nn.Module) -> None:
    """No plan is in force any more, also none of a part."""
    for module in model.modules():
        module.__dict__.pop(_PLAN, None)
        module.__dict__.pop(_KERNELS, None)


@contextmanager
def unconverted(model: nn.Module) -> Iterator[None]:
    """Takes conversions back for the time being, and puts the same plans in force again afterwards."""
    plans = [
        (module, plan, kernels_in_force(module))
        for module in model.modules()
        if (plan := current_plan(module)) is not None
    ]
    revert(model)
    try:
        yield
    finally:
        for module, plan, kernels in plans:
            apply(module, plan, emulate=True, kernels=kernels)  # it was in force, so what it emulates was agreed to
