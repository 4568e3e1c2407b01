"""One decision per layer: what it runs in after a plan is applied, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deepseek_mp.nn.assign import Assigned, around
from deepseek_mp.nn.survey import Survey
from deepseek_mp.nn.unit import NARROW_FORMATS, Unit, multiplies, original_class
from deepseek_mp.ops.dtypes import format_of
from deepseek_mp.precision import Decision, PrecisionPlan, Reason

# Reasons that follow from the plan, the model and the device; all others were measured and are kept.
_DERIVED = (
    Reason.PINNED, Reason.REQUESTED, Reason.EMULATED, Reason.NOT_CONTROLLABLE,
    Reason.NO_KERNEL, Reason.SHAPE, Reason.OUTPUT_LAYER,
)  # fmt: skip


def decisions(
    model: nn.Module,
    plan: PrecisionPlan,
    found: Survey,
    assigned: Mapping[str, Assigned],
    *,
    before: PrecisionPlan | None,
    emulated: frozenset[str],
) -> Iterator[Decision]:
    """The plan's decisions about the whole run, then one for each layer in the model's order.

    `before` is the plan in force until now; `emulated` names the recipes that the device has no units for.
    """
    given = {decision.layer: decision for decision in plan.decisions if decision.role is None}
    shared = _sharing(found)
    if "" in given and "" not in found.names:
        yield given[""]
    for name, module in model.named_modules():
        old = _format_now(before, module)
        if name in found.uncontrollable:
            yield Decision(
                layer=name,
                old=old,
                new=around(plan.base).name,
                reason=Reason.NOT_CONTROLLABLE,
                detail=found.uncontrollable[name],
            )
        elif name in found.units:
            notes = [
                found.notes.get(name, ""),
                _sharing_note(name, shared, assigned),
                _kernel_note(module, assigned[name]),
            ]
            reason = _reason(name, plan, assigned[name], emulated)
            yield _decision(name, old, reason, assigned[name], given.get(name), "; ".join(filter(None, notes)))


def _decision(name: str, old: str, reason: Reason, assigned: Assigned, given: Decision | None, detail: str) -> Decision:
    new, evidence = assigned.recipe.name, _implementations(assigned)
    kept = given is not None and given.new == new and given.reason not in _DERIVED
    if given is not None and kept and reason in (Reason.REQUESTED, Reason.PINNED):
        return replace(given, old=old, detail=given.detail or detail, evidence={**given.evidence, **evidence})
    return Decision(layer=name, old=old, new=new, reason=reason, detail=detail, evidence=evidence)


def _reason(name: str, plan: PrecisionPlan, assigned: Assigned, emulated: frozenset[str]) -> Reason:
    if assigned.reason is not None:
        return assigned.reason
    if assigned.recipe.name in emulated:
        return Reason.EMULATED
    return Reason.REQUESTED if plan.rule_for(name) is None else Reason.PINNED


def _implementations(assigned: Assigned) -> dict[str, Any]:
    """Which implementation of each op runs the layer, for the decision's evidence."""
    products = assigned.products
    return {} if products is None else {"quantise": products.quantise, "product": products.product}


def _format_now(before: PrecisionPlan | None, module: nn.Module) -> str:
    """The recipe the module runs in before the change; of an unconverted one the format it is stored in."""
    if isinstance(module, Unit):
        return module.unit_precision.recipe.name
    if before is not None:
        return around(before.base).name
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


def _sharing_note(name: str, shared: Mapping[str, list[str]], assigned: Mapping[str, Assigned]) -> str:
    uses = [f"{other!r} ({assigned[other].recipe.name})" for other in dict.fromkeys(shared.get(name, ()))]
    return f"shares its weight with {', '.join(uses)}, each casts its own copy" if uses else ""


def _kernel_note(module: nn.Module, assigned: Assigned) -> str:
    """Why a unit does not run as asked. Of norms, embeddings and the like: a narrow region may change nothing."""
    if assigned.recipe.region in NARROW_FORMATS and not multiplies(original_class(module)):
        return "no matrix product, so autocast's own list decides what runs"
    return assigned.detail
