"""The precision plan: ordered rules from layer names to recipes, first match wins.

A plan is plain data. Its rules are tried in order against a layer's name and the names of the
modules around it, so `layer4` covers `layer4.0.conv1`; patterns are shell globs (`*.norm*`), whose
`*` also matches dots. A pin is just a rule put first. `base` is the recipe of everything no rule
names, and `base.region` the format of the autocast region the model runs in.

Once resolved against a model, the plan also carries one `Decision` per layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from deepseek_mp.errors import PlanError, explain, suggest
from deepseek_mp.precision.checks import read_object, require, require_all, shown
from deepseek_mp.precision.decision import Decision
from deepseek_mp.precision.recipe import Recipe
from deepseek_mp.precision.recipes import RECIPES, find_recipe

PLAN_VERSION = 1
MemoryFormat = Literal["contiguous", "channels_last"]
SHOWN_NAMES = 8


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Layers whose name, or an enclosing module's name, matches `pattern` run in `recipe`.

    `recipe` may be given by its name. The model itself has the empty name and encloses nothing here:
    use `*` for every layer. `PlanError` for a pattern that is not a string or an unknown recipe.
    """

    pattern: str
    recipe: Recipe

    def __post_init__(self) -> None:
        require("rule pattern", self.pattern, str, "Pass a glob over layer names, for example 'layer4' or '*.norm*'")
        object.__setattr__(self, "recipe", find_recipe(self.recipe))

    def matches(self, name: str) -> bool:
        """Whether the rule covers the layer `name` (a dotted module path)."""
        return any(fnmatchcase(path, self.pattern) for path in _enclosing(name))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a recipe known by name is written as its name."""
        return {"pattern": self.pattern, "recipe": _recipe_to_json(self.recipe)}

    @classmethod
    def from_json(cls, data: object) -> Rule:
        """The rule that `to_json` wrote; `PlanError` when `data` is anything else."""
        values = read_object("a rule", data, ("pattern", "recipe"))
        return cls(pattern=values["pattern"], recipe=_recipe_from_json(values["recipe"]))

    def __str__(self) -> str:
        return f"{self.pattern} -> {self.recipe}"


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """Which recipe each layer runs in. Frozen; `with_pins` returns a new plan.

    `base` may be given by its name. `PlanError` for values that no plan can have.
    """

    base: Recipe
    rules: tuple[Rule, ...] = ()
    memory_format: MemoryFormat = "contiguous"
    decisions: tuple[Decision, ...] = ()

    def __post_init__(self) -> None:
        rules = require_all("rules", self.rules, Rule, "Use PrecisionPlan.of(base, {pattern: recipe}) for a mapping")
        decisions = require_all("decisions", self.decisions, Decision, "Leave them out for a plan not yet resolved")
        object.__setattr__(self, "base", find_recipe(self.base))
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "decisions", decisions)
        if self.memory_format not in get_args(MemoryFormat):
            allowed = " or ".join(map(repr, get_args(MemoryFormat)))
            raise PlanError(explain(f"memory_format is {shown(self.memory_format)}", allowed, "Use one of the two"))

    @classmethod
    def of(cls, base: str | Recipe, pin: Mapping[str, str | Recipe] | None = None) -> PrecisionPlan:
        """A plan with one base recipe and, before it, the pins in their order."""
        return cls(base=find_recipe(base)).with_pins({} if pin is None else pin)

    def with_pins(self, pin: Mapping[str, str | Recipe]) -> PrecisionPlan:
        """This plan with the rules of `pin` put before all others.

        The new plan has no decisions, since those it had were taken under other rules.
        """
        if not isinstance(pin, Mapping):
            allowed = "a mapping of layer patterns to recipes"
            raise PlanError(explain(f"pin is {shown(pin)}", allowed, "Pass for example {'*.norm*': 'fp32'}"))
        first = tuple(Rule(pattern=pattern, recipe=find_recipe(recipe)) for pattern, recipe in pin.items())
        return replace(self, rules=first + self.rules, decisions=()) if first else self

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that covers the layer, or None when it follows `base`."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def recipe_for(self, name: str) -> Recipe:
        """The recipe of the layer `name`."""
        rule = self.rule_for(name)
        return self.base if rule is None else rule.recipe

    def check_names(self, names: Iterable[str]) -> None:
        """`PlanError` if a rule covers none of the layers `names`."""
        known = list(names)
        for rule in self.rules:
            if not any(rule.matches(name) for name in known):
                raise PlanError(
                    explain(
                        f"rule {rule.pattern!r} -> {rule.recipe} matches no layer of this model",
                        f"a glob over {_list_names(known)}",
                        f"Correct the pattern or remove the rule.{_suggest_pattern(rule.pattern, known)}",
                    )
                )

    @property
    def formats(self) -> frozenset[str]:
        """Names of the recipes the plan can use."""
        return frozenset({self.base.name, *(rule.recipe.name for rule in self.rules)})

    @property
    def digest(self) -> str:
        """A hash of what the plan makes the model do: rules, base and memory format."""
        acts = json.dumps(replace(self, decisions=()).to_json(), sort_keys=True)
        return hashlib.sha256(acts.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; recipes known by name are written as names."""
        return {
            "version": PLAN_VERSION,
            "base": _recipe_to_json(self.base),
            "rules": [rule.to_json() for rule in self.rules],
            "memory_format": self.memory_format,
            "decisions": [decision.to_json() for decision in self.decisions],
        }

    @classmethod
    def from_json(cls, data: object) -> PrecisionPlan:
        """The plan that `to_json` wrote; `PlanError` on another version, or fields missing, unknown or not valid."""
        if isinstance(data, Mapping):
            _check_version(data.get("version"))
        values = read_object("a plan", data, ("version", *(f.name for f in fields(cls))))
        again = "Write the plan as PrecisionPlan.save does"
        return cls(
            base=_recipe_from_json(values["base"]),
            rules=tuple(map(Rule.from_json, require("rules", values["rules"], list, again))),
            memory_format=values["memory_format"],
            decisions=tuple(map(Decision.from_json, require("decisions", values["decisions"], list, again))),
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PrecisionPlan:
        """Read a plan that `save` wrote; `PlanError` if it is something else, `OSError` if it cannot be opened."""
        text = Path(path).read_bytes()
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(explain(f"{path} is not JSON ({error})", "a plan file", "Save the plan again")) from error
        return cls.from_json(data)

    def __repr__(self) -> str:
        return f"<PrecisionPlan {self.base.name}, {len(self.rules)} rules, {len(self.decisions)} decisions>"

    def __str__(self) -> str:
        lines = [f"base {self.base}, {self.memory_format}", *map(str, self.rules), *map(str, self.decisions)]
        return "\n".join(lines)


def _enclosing(name: str) -> list[str]:
    """The name and those of the modules around it, outermost first: a.b gives a and a.b."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _list_names(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    if not names:
        return "the layers of a model; this one has none"
    more = len(names) - SHOWN_NAMES
    return ", ".join(map(repr, names[:SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")


def _suggest_pattern(pattern: str, names: list[str]) -> str:
    return suggest(pattern, dict.fromkeys(path for name in names for path in _enclosing(name)))


def _check_version(version: object) -> None:
    if type(version) is int and version == PLAN_VERSION:  # not True nor 1.0, which are equal to it
        return
    raise PlanError(
        explain(
            f"plan of record version {shown(version)}",
            f"version {PLAN_VERSION}",
            "Read it with the release of this package that wrote it",
        )
    )


def _recipe_to_json(recipe: Recipe) -> str | dict[str, Any]:
    return recipe.name if RECIPES.get(recipe.name) == recipe else recipe.to_json()


def _recipe_from_json(data: Any) -> Recipe:
    return Recipe.from_json(data) if isinstance(data, Mapping) else find_recipe(data)
