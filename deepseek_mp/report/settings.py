"""The settings of a run, flat: versions, device, configuration and plan as dotted names with plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_mp.errors import PlanError
from deepseek_mp.precision import RECIPES, PrecisionPlan, Recipe
from deepseek_mp.records import Run

NOT_THERE = "(not recorded)"
CALLBACKS = "callbacks"
"""Where the settings of callbacks are, by the names of their classes."""
TOLD_ELSEWHERE = ("device.notes", "device.peak_tflops", "device.recommended", "device.confidence")
"""What the capability table says of a device: it follows from the device's id and the release."""


def settings_of(run: Run, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Name -> value of the latest attempt, or of the attempt whose `info` is given, and of the plan in force."""
    found = dict(_flat("", run.info if info is None else info))
    if info is None and run.plan is not None:
        found |= {f"plan.{name}": value for name, value in _plan_values(run.plan).items()}
    return {name: value for name, value in found.items() if not name.startswith(TOLD_ELSEWHERE)}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value here, value there) where two runs' settings differ.

    The settings of a callback that only one of them has are one value, a mapping.
    """
    one, other = _folded(one, other), _folded(other, one)
    names = dict.fromkeys([*one, *other])
    pairs = [(name, one.get(name, NOT_THERE), other.get(name, NOT_THERE)) for name in names]
    return [(name, a, b) for name, a, b in pairs if as_text(a) != as_text(b)]


def _folded(settings: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with each callback that `other` lacks as one."""
    there = {_callback(name) for name in other}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        callback = _callback(name)
        if callback and callback not in there:
            found.setdefault(callback, {})[name.removeprefix(f"{callback}.")] = value
        else:
            found[name] = value
    return found


def _callback(name: str) -> str:
    """Which callback a setting is one of: the first two parts of its name; empty for all else."""
    parts = name.split(".", 2)
    return ".".join(parts[:2]) if parts[0] == CALLBACKS and len(parts) == 3 else ""


def as_text(value: Any) -> str:
    """A plain value in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(as_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def read_plan(stored: Mapping[str, Any] | None) -> PrecisionPlan | str | None:
    """The plan of a run; what is wrong with it, in words, if this release cannot read it."""
    if stored is None:
        return None
    try:
        return PrecisionPlan.from_json(stored)
    except PlanError as error:
        return str(error)


def recipes_of(run: Run) -> dict[str, Recipe]:
    """Every recipe that the run's decisions can name: those with a name, and those its plan spells out."""
    plan = read_plan(run.plan)
    own = [plan.base, *(rule.recipe for rule in plan.rules)] if isinstance(plan, PrecisionPlan) else []
    return {**RECIPES, **{recipe.name: recipe for recipe in own}}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings; a plan among them as its few values."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    inner = _plan_values(value) if {"base", "rules"} <= set(value) else value
    if prefix and not inner:
        yield prefix, None
    for name, item in inner.items():
        yield from _flat(f"{prefix}.{name}" if prefix else str(name), item)


def _plan_values(plan: Mapping[str, Any]) -> dict[str, Any]:
    rules = plan.get("rules")
    return {
        "base": _recipe_name(plan.get("base")),
        "rules": [_rule(rule) for rule in rules] if isinstance(rules, list) else rules,
        "memory_format": plan.get("memory_format"),
    }


def _rule(rule: Any) -> str:
    if not isinstance(rule, Mapping):
        return str(rule)
    return f"{rule.get('pattern')} -> {_recipe_name(rule.get('recipe'))}"


def _recipe_name(recipe: Any) -> str:
    """The name of a recipe, stored as a name or in full."""
    return str(recipe.get("name") if isinstance(recipe, Mapping) else recipe)
