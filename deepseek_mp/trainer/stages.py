"""The stages of a progressive run: FP32, then plans that lower more and more of its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from itertools import pairwise
from typing import Any

from torch import nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn import memory_format_of, units
from deepseek_mp.nn.unit import NARROW_FORMATS
from deepseek_mp.precision import PrecisionPlan, Recipe
from deepseek_mp.trainer.lowering import Lowered, by_saving

BASELINE = "fp32"
HALF, ALL = "half", "all"
SHARES = (0.5, 1.0)
"""Shares of the layers that the stages lower, if nothing is said."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""A stage's name is that of its run directory."""

Shares = Sequence[float] | Mapping[str, str | Recipe | PrecisionPlan]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its name, its plan, and the layers that the plan lowers."""

    name: str
    plan: PrecisionPlan
    lowered: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The stages after the baseline, and if there are none, why."""

    stages: tuple[Stage, ...]
    none: str = ""


def baseline_stage(model: nn.Module) -> Stage:
    """FP32 throughout, in the memory format that the model has."""
    return Stage(name=BASELINE, plan=replace(PrecisionPlan.of("fp32"), memory_format=memory_format_of(model)))


def check_stages(stages: Any) -> None:
    """`ConfigError` unless it is None, rising shares of the layers, or plans by name."""
    if stages is None:
        return
    if isinstance(stages, Mapping):
        wrong = [name for name in stages if not (isinstance(name, str) and NAME.fullmatch(name)) or name == BASELINE]
        if wrong or not stages:
            passed = f"stages with the name {wrong[0]!r}" if wrong else "no stage"
            allowed = f"names of letters, digits, '_', '.' and '-', other than {BASELINE!r}, which is the baseline's"
            raise ConfigError(
                explain(passed, allowed, "Rename the stage" if wrong else "Name one, or leave stages out")
            )
        return
    shares = list(stages) if isinstance(stages, Sequence) and not isinstance(stages, str) else []
    numbers = all(isinstance(share, int | float) and 0 < share <= 1 for share in shares)
    if not shares or not numbers or any(b <= a for a, b in pairwise(shares)):
        allowed = "rising shares of the layers, above 0 and at most 1, or a mapping of names to plans"
        raise ConfigError(explain(f"stages={stages!r}", allowed, "Pass for example (0.25, 0.5, 1.0)"))


def stages_of(
    model: nn.Module, plan: PrecisionPlan, lowered: Sequence[Lowered], shares: Sequence[float]
) -> list[Stage]:
    """The stages on the way to a plan: for each share, that many of the layers that it lowers, the best first.

    The last share, if it is 1, is the plan itself. A share that would lower no more layers than the one before is left
    out, and so are all but the plan itself where it cannot be mixed with FP32 (TF32, a setting of the process).
    """
    ordered = by_saving(lowered)
    mixes = all(not layer.recipe.is_plain or layer.recipe.name in NARROW_FORMATS for layer in lowered)
    found: list[Stage] = []
    done = 0
    for share in shares:
        count = math.ceil(share * len(ordered))
        if share == 1:
            found.append(Stage(name=ALL, plan=plan, lowered=tuple(layer.name for layer in lowered)))
        elif mixes and done < count < len(ordered):
            chosen = ordered[:count]
            partial = partial_plan(list(units(model)), plan, chosen)
            found.append(Stage(name=share_name(share), plan=partial, lowered=tuple(layer.name for layer in chosen)))
            done = count
    return found


def partial_plan(names: Sequence[str], plan: PrecisionPlan, chosen: Sequence[Lowered]) -> PrecisionPlan:
    """FP32, but for the chosen layers, which run in what the plan gives them.

    A rule covers the layers inside the one it names too: where one of them is not chosen, it has a rule of its own
    before that.
    """
    recipes: dict[str, str | Recipe] = {layer.name: layer.recipe for layer in chosen}
    inside = [name for name in names if name not in recipes and any(name.startswith(f"{outer}.") for outer in recipes)]
    rules = {**recipes, **dict.fromkeys(inside, "fp32")}
    deepest_first = sorted(rules, key=lambda name: -name.count("."))
    decisions = tuple(decision for decision in plan.decisions if decision.layer in recipes)
    return replace(
        PrecisionPlan.of("fp32", {escape(name): rules[name] for name in deepest_first}),
        memory_format=plan.memory_format,
        decisions=decisions,
    )


def share_name(share: float) -> str:
    """What the stage of a share of the layers is called."""
    return HALF if share == 0.5 else ALL if share == 1 else f"{100 * share:g}pct"
