"""Settings of live precision, each with what it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from deepseek_mp.errors import ConfigError, explain, suggest
from deepseek_mp.precision import RECIPES
from deepseek_mp.precision.allocation import Objective
from deepseek_mp.precision.checks import shown
from deepseek_mp.precision.planning import NOISE_BUDGET, SMALL_LOSS

OBJECTIVES: Mapping[str, Objective] = MappingProxyType({"time": "seconds", "memory": "bytes"})
"""What the allocation minimises, by its name in the settings."""
PLAIN = ("fp32", "tf32", "bf16", "fp16")
"""Recipes without scales that layers may go to; FP64 and HF32 are not among them."""
ALLOWED = (*PLAIN, *(name for name, recipe in RECIPES.items() if not recipe.is_plain))


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings:
    """What a live controller may spend, and how fast it moves. Defaults suit a first run.

    loss_budget, noise_budget          relative rise of the loss, and relative variance added to the gradient, allowed
    recipes, objective, by_role        what layers may run in, whether 'time' or 'memory' is saved, one recipe a product
    warm_up, decide_every,             steps before the first decision and between two; decisions that must agree; share
    confirmations, most_at_once        of the layers that one may lower
    probe_every, probe_share, share    steps between probes, their part of the time, the part of a batch they look at
    patience, longest_patience         steps that a layer stays raised after a guard, at first and at most
    watch_inputs, pays, compare_every  see docs/adaptive.md

    `ConfigError` for a value that is not allowed.
    """

    loss_budget: float = SMALL_LOSS
    """Relative rise of the loss that all lowered products together may cause: 40 % of the 0.25 % that the DeepSeek-V3
    report accepted of FP8 (arXiv 2412.19437, appendix B)."""
    noise_budget: float = NOISE_BUDGET
    """Variance that rounding may add to the gradient, relative to that of a batch."""
    recipes: tuple[str, ...] | None = None
    """What layers may run in beside the format of the region: scaled recipes, and 'fp32', 'tf32', 'bf16', 'fp16'. None:
    the FP8 recipes that the device multiplies, and above a bf16 region fp32 (tf32 where the device has it). A list is
    stored as a tuple."""
    objective: str = "time"
    """What lowering is to save: measured 'time', or 'memory', the bytes that layers keep for backward."""
    by_role: bool = False
    """Let the three products of a layer have recipes of their own."""
    warm_up: int = 200
    """Steps before the first decision: low precision in the first steps can do lasting harm (arXiv 2403.02243)."""
    probe_every: int = 64
    """Steps between two probes; each is a forward and half a backward on `share` of a batch."""
    probe_share: float = 0.005
    """At most this part of the time goes into probes: they come less often where one takes long."""
    share: float = 0.125
    """Part of a batch that a probe looks at."""
    decide_every: int | None = None
    """Steps between two decisions; None: a 64th of the run, from 32 to 256."""
    confirmations: int = 3
    """Decisions in a row that must agree before a layer is lowered, after the first allocation. Raising needs none."""
    watch_inputs: bool = True
    """Look at some rows of the lowered layers' inputs in every step, in eager mode and in one process. A step in which
    one is far larger than in the probes is not applied, and the layer is raised."""
    patience: int = 1024
    """Steps that a layer stays raised after a guard raised it; doubles with every repetition."""
    longest_patience: int = 16384
    """What `patience` doubles up to."""
    most_at_once: float = 0.25
    """Share of the layers that one decision may lower, at least one; the first allocation may lower all."""
    pays: float = 4.0
    """How many times what it costs in steps a layer must save in time to be lowered."""
    compare_every: int = 1024
    """Steps between two comparisons of the loss with that in FP32, on the batch of a probe."""

    def __post_init__(self) -> None:
        for name in ("loss_budget", "noise_budget", "share", "probe_share", "most_at_once", "pays"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
                raise ConfigError(explain(f"{name}={value!r}", "a number above zero", f"Change {name}"))
        for name in ("probe_every", "confirmations", "patience", "longest_patience", "compare_every"):
            self._check_count(name, 1)
        self._check_count("warm_up", 0)
        if self.decide_every is not None:
            self._check_count("decide_every", 1)
        if self.share > 1 or self.most_at_once > 1:
            raise ConfigError(explain("a share above one", "at most 1", "Change share or most_at_once"))
        if self.longest_patience < self.patience:
            passed = f"longest_patience={self.longest_patience} with patience={self.patience}"
            raise ConfigError(explain(passed, "at least patience", "Raise longest_patience or lower patience"))
        for name in ("by_role", "watch_inputs"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(explain(f"{name}={shown(value)}", "True or False", f"Change {name}"))
        if not isinstance(self.objective, str) or self.objective not in OBJECTIVES:
            allowed = " or ".join(map(repr, OBJECTIVES))
            raise ConfigError(explain(f"objective={shown(self.objective)}", allowed, "Change objective"))
        if self.recipes is not None:
            object.__setattr__(self, "recipes", _checked_recipes(self.recipes))

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            raise ConfigError(explain(f"{name}={value!r}", f"a whole number from {least}", f"Change {name}"))

    def interval(self, total_steps: int | None) -> int:
        """Steps between two decisions in a run of this length."""
        if self.decide_every is not None:
            return self.decide_every
        return 256 if total_steps is None else min(256, max(32, total_steps // 64))

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, by the name of the field."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in fields(self)
        }


def _checked_recipes(recipes: object) -> tuple[str, ...]:
    """The names as a tuple; `ConfigError` if they are no list or tuple of recipes that layers may go to."""
    passed = f"recipes={shown(recipes)}"
    if not isinstance(recipes, list | tuple):
        example = f"({recipes!r},)" if isinstance(recipes, str) else "('fp32', 'block')"
        raise ConfigError(explain(passed, "a tuple of names of recipes", f"Pass recipes={example}"))
    if not recipes:
        change = "Name a recipe, or leave recipes out for those that the device has"
        raise ConfigError(explain(passed, "one name or more, or None", change))
    for name in recipes:
        if not (isinstance(name, str) and name in ALLOWED):
            hint = suggest(name, ALLOWED) if isinstance(name, str) else ""
            change = f"Change {shown(name)} to one of these names.{hint}"
            raise ConfigError(explain(passed, ", ".join(ALLOWED), change))
    return tuple(recipes)
