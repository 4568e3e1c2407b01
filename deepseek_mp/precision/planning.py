"""From what was predicted for every unit to a plan within budgets, by the solver that a live controller uses too.

An item of the allocation is a unit; its choices are the recipes that it can take, and with `by_role` also those that
leave some of its products in the plan's base. Seconds are measured where they were; elsewhere they are multiply-adds
over a rate that doubles with every halving of the width, and every decision says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from deepseek_mp.errors import ConfigError, PlanError, explain
from deepseek_mp.precision import RECIPES, Decision, PrecisionPlan, Reason, Recipe, Role, Rule
from deepseek_mp.precision.allocate import allocate
from deepseek_mp.precision.allocation import Allocation, Budget, Choice, Item, Objective
from deepseek_mp.precision.composite import with_roles
from deepseek_mp.precision.kept import kept_bytes

PAYS = 1.05
"""How much faster a layer must be in a scaled recipe to leave the format of the region around it."""
SMALL_LOSS = 1e-3
NOISE_BUDGET = 0.05
"""Default budgets: a tenth of a percent of the loss; a twentieth more examples, half of what activation compression
warns at (GACT, arXiv 2206.11357)."""
TYPICAL_RATE = 1e11
"""Multiply-adds a second in FP32 that stand for a device nothing was timed on; only ratios matter."""
MEASURED = "measured"
"""In the evidence of a decision, what its seconds are; else they are guessed."""
_SPEEDS = {"fp64": 0.5, "fp32": 1.0, "hf32": 2.0, "tf32": 2.0, "bf16": 4.0, "fp16": 4.0}
_FP8_SPEED, _FP4_SPEED = 8.0, 16.0


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a recipe costs in one product of a unit."""

    loss: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class UnitCosts:
    """What an allocation needs to know of a unit: for each recipe the costs by role, and seconds of a whole step."""

    name: str
    macs: float
    predicted: Mapping[str, Mapping[Role, Predicted]]
    seconds: Mapping[str, float]
    """Measured, by recipe; empty: not measured."""
    inputs: int = 0
    """Numbers in its input, which is kept for backward; 0: not known."""
    above: str = ""
    """A recipe above the base that is a choice whether it saves anything or not; none where empty."""


def speed_of(recipe: Recipe) -> float:
    """How many times the rate of FP32 a product in the recipe is taken to have, where nothing was timed."""
    name = recipe.fprop.left.format.name
    if recipe.is_plain:
        return _SPEEDS.get(name, 1.0)
    return _FP4_SPEED if recipe.fprop.left.format.storage_bits < 8 else _FP8_SPEED


def choices_of(
    unit: UnitCosts, recipes: Sequence[Recipe], base: Recipe, *, by_role: bool, objective: Objective = "seconds"
) -> dict[str, Recipe]:
    """The recipes that the unit can choose from, by name: FP32 if it may, the base, those that pay in the objective.

    And mixtures of them with the base, by product, but for recipes of the user's own.
    """
    fp32 = RECIPES["fp32"]
    found = {recipe.name: recipe for recipe in (fp32, base) if recipe == base or choice_for(unit, fp32).loss < math.inf}
    for recipe in recipes:
        if recipe.name not in unit.predicted or not (recipe.name == unit.above or _pays(unit, recipe, base, objective)):
            continue
        found[recipe.name] = recipe
        if by_role and not recipe.is_plain and RECIPES.get(recipe.name) == recipe:
            for count in (1, 2):
                for roles in combinations(Role, count):
                    mixed = with_roles(recipe, roles, base)
                    found[mixed.name] = mixed
    return found


def _pays(unit: UnitCosts, recipe: Recipe, base: Recipe, objective: Objective) -> bool:
    """Whether leaving the base for the recipe saves enough to count; what is wider than the base need not."""
    wider = recipe.is_plain and speed_of(recipe) < speed_of(base)
    if objective == "bytes":
        return wider or kept_bytes(recipe, 8) < kept_bytes(base, 8)
    return wider or _seconds(unit, recipe) * PAYS < _seconds(unit, base)


def choice_for(unit: UnitCosts, recipe: Recipe) -> Choice:
    """Its costs for the solver: those of its products, each in the recipe it comes from."""
    loss = noise = seconds = 0.0
    for role in Role:
        part = _origin(recipe, role)
        predicted = unit.predicted.get(part.name, {}).get(role)
        if predicted is not None:
            loss += predicted.loss
            noise += predicted.noise
        seconds += _seconds(unit, part) / len(Role)  # each product is taken to have a third of a step's time
    if not math.isfinite(noise):
        loss, noise = math.inf, 0.0
    return Choice(recipe.name, seconds, loss, noise, kept_bytes(recipe, unit.inputs))


def _seconds(unit: UnitCosts, recipe: Recipe) -> float:
    """A step's time: measured, or by the widths of formats, from what was measured in FP32 if anything was."""
    if recipe.name in unit.seconds:
        return unit.seconds[recipe.name]
    fp32 = unit.seconds.get("fp32", unit.macs / TYPICAL_RATE)
    return fp32 / speed_of(recipe)


def origin_of(recipe: str, role: Role, rest: str) -> str:
    """The recipe with a name of its own that a product of `row[fprop]` has: `row`, or `rest` in other products."""
    own, _, roles = recipe.rstrip("]").partition("[")
    return own if not roles or role.value in roles.split("+") else rest


def _origin(recipe: Recipe, role: Role) -> Recipe:
    """The same for recipes; the rest of a mixture is a plain one."""
    if "[" not in recipe.name:
        return recipe
    return RECIPES[origin_of(recipe.name, role, recipe.role(role).left.format.name)]


def plan_for(
    units: Sequence[UnitCosts],
    recipes: Sequence[Recipe],
    base: Recipe,
    budget: Budget,
    *,
    by_role: bool,
    objective: Objective = "seconds",
) -> tuple[PrecisionPlan, Allocation | None]:
    """A plan of one rule for each unit that leaves the base, with a decision for every unit: least time or bytes.

    Raises:
        PlanError: not even FP32 in every unit meets the budget.
    """
    options = {unit.name: choices_of(unit, recipes, base, by_role=by_role, objective=objective) for unit in units}
    items = [
        Item(unit.name, tuple(choice_for(unit, recipe) for recipe in options[unit.name].values())) for unit in units
    ]
    if not items:
        return PrecisionPlan(base=base), None
    found = allocate(items, budget, objective)
    if not found.is_feasible:
        raise PlanError(explain(f"no allocation: {found.exceeded}", "a budget that FP32 meets", "Raise the budget"))
    rules, decisions = [], []
    for unit, item in zip(units, items, strict=True):
        chosen = found.choices[unit.name]
        recipe = options[unit.name][chosen.name]
        if recipe.name != base.name:
            rules.append(Rule(pattern=unit.name, recipe=recipe))
        decisions.append(
            Decision(
                layer=unit.name,
                old=base.name,
                new=recipe.name,
                reason=Reason.ALLOCATED,
                detail=found.explain(item).removeprefix(f"{recipe.name}: "),
                evidence=_evidence(unit, chosen, choice_for(unit, base)),
            )
        )
    return PrecisionPlan(base=base, rules=tuple(rules), decisions=tuple(decisions)), found


def _evidence(unit: UnitCosts, chosen: Choice, kept: Choice) -> dict[str, Any]:
    """What the choice costs, and what it saves against the base."""
    measured = chosen.name.split("[")[0] in unit.seconds
    found = {
        "loss": chosen.loss,
        "noise": chosen.noise,
        "seconds": chosen.seconds,
        "seconds_are": MEASURED if measured else "guessed from the width of its formats",
        "saved_seconds": kept.seconds - chosen.seconds,
    }
    return found | ({"kept_bytes": chosen.bytes, "saved_bytes": kept.bytes - chosen.bytes} if unit.inputs else {})


def check_budget(budget: float, noise_budget: float) -> Budget:
    """`ConfigError` naming what a budget may be."""
    for name, value in (("budget", budget), ("noise_budget", noise_budget)):
        if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
            allowed = "a number above zero: the relative rise of the loss, or of the gradient's variance"
            raise ConfigError(explain(f"{name}={value!r}", allowed, "Pass for example budget=1e-3"))
    return Budget(loss=float(budget), noise=float(noise_budget))
