"""The report of a profile: a mapping from units to what was found, the plan that follows, a table, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_mp.errors import PlanError, explain, suggest
from deepseek_mp.precision import RECIPES, PrecisionPlan, Recipe, Role, find_recipe
from deepseek_mp.precision.allocation import Allocation, Budget
from deepseek_mp.precision.planning import (
    MEASURED,
    NOISE_BUDGET,
    SMALL_LOSS,
    Predicted,
    UnitCosts,
    check_budget,
    choice_for,
    plan_for,
)
from deepseek_mp.profiler.text import render_profile
from deepseek_mp.profiler.unit_profile import UnitProfile

REPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Predictions beside the true change of the loss of single units, on batches that were not part of the estimate."""

    pairs: int
    plain: int
    """Pairs whose true change is more than what batches scatter; of the others it says little."""
    rank_correlation: float | None
    """Spearman's, of the predicted change and the size of the true one; None for fewer than three pairs."""
    held_out: bool
    """Whether the batches came after those of the estimate; else it was the last of them."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class ProfileReport(Mapping[str, UnitProfile]):
    """`report['layer4.conv1']['fp16_loss']`; iterates over the units in the model's order."""

    def __init__(
        self,
        units: Mapping[str, UnitProfile],
        *,
        basis: str,
        base: str,
        recipes: Sequence[str | Recipe],
        batches: int = 0,
        loss: float | None = None,
        skipped: Sequence[str] = (),
        native: Sequence[str] = (),
        budget: Budget | None = None,
        verification: Verification | None = None,
    ) -> None:
        self._units = dict(units)
        self.basis = basis
        """'weights' (no data was seen) or 'batches'."""
        self.base = base
        """The plan's base: what a unit runs in that nothing else is recommended for."""
        self._by_name = {recipe.name: recipe for recipe in map(find_recipe, recipes)}
        self.recipes = tuple(self._by_name)
        self.batches = batches
        self.loss = loss
        """Mean loss of the batches."""
        self.skipped = tuple(skipped)
        """Batches that were left out, and why."""
        self.native = tuple(native)
        """Recipes that the device multiplies without emulation."""
        self.budget = budget
        """What the recommendations may cost together; None: nothing is recommended."""
        self.verification = verification

    def __getitem__(self, name: str) -> UnitProfile:
        try:
            return self._units[name]
        except KeyError:
            hint = suggest(name, self._units)
            raise KeyError(f"no unit {name!r} in this report.{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def plan(
        self,
        budget: float = SMALL_LOSS,
        *,
        noise_budget: float = NOISE_BUDGET,
        by_role: bool = False,
        recipes: Sequence[str | Recipe] | None = None,
    ) -> PrecisionPlan:
        """The plan that saves most time within the budgets, for `MixedPrecisionTrainer(precision_mode=...)`.

        Args:
            budget: relative rise of the loss that all units together may cause, 1e-3 for a tenth of a percent.
            noise_budget: variance that rounding may add to the gradient, relative to that of a batch.
            by_role: let a unit's three products have different recipes.
            recipes: what to choose from; by default what was profiled and the device multiplies, but for fp16 beside
                another base: it would need a loss scale.

        Raises:
            ConfigError: a budget that is not a positive number.
            PlanError: this report saw no data, so there is nothing to weigh a budget with; a recipe not profiled.
        """
        return self.allocation(budget, noise_budget=noise_budget, by_role=by_role, recipes=recipes)[0]

    def allocation(
        self,
        budget: float = SMALL_LOSS,
        *,
        noise_budget: float = NOISE_BUDGET,
        by_role: bool = False,
        recipes: Sequence[str | Recipe] | None = None,
    ) -> tuple[PrecisionPlan, Allocation | None]:
        """`plan`, with what the solver found: totals, prices, what is left of the budgets."""
        limits = check_budget(budget, noise_budget)
        if self.basis != "batches":
            allowed = "a report of analyze(batches)"
            raise PlanError(explain("a plan from a report without data", allowed, "Pass batches to analyze"))
        chosen = self._chosen(recipes)
        costs = [_costs(name, unit) for name, unit in self._units.items() if _is_allocated(unit)]
        return plan_for(costs, chosen, RECIPES[self.base], limits, by_role=by_role)

    def _chosen(self, recipes: Sequence[str | Recipe] | None) -> list[Recipe]:
        if recipes is None:
            return [self._by_name[name] for name in self.recipes if name in self.native and name != "fp16"]
        names = [recipe if isinstance(recipe, str) else recipe.name for recipe in recipes]
        for name in names:
            if name not in self.recipes:
                allowed = ", ".join(self.recipes)
                raise PlanError(explain(f"recipe {name!r}, which was not profiled", allowed, "Profile it too"))
        return [self._by_name[name] for name in names]

    def step_seconds(self, recipe: str) -> float:
        """Seconds of a step that all units together take in one recipe; guessed for units where it was not timed."""
        units = [_costs(name, unit) for name, unit in self._units.items() if _is_allocated(unit)]
        return math.fsum(choice_for(unit, RECIPES[recipe]).seconds for unit in units)

    def with_plan(
        self, plan: PrecisionPlan, *, budget: float = SMALL_LOSS, noise_budget: float = NOISE_BUDGET
    ) -> ProfileReport:
        """The same report recommending what a `plan` made with these budgets decided."""
        changed = {}
        for decision in plan.decisions:
            evidence = decision.evidence
            spent = {key: evidence[key] for key in ("loss", "noise", "seconds")}
            changed[decision.layer] = self[decision.layer].with_values(
                recommended=decision.new,
                reason=decision.detail,
                spent={**spent, "measured": evidence["seconds_are"] == MEASURED},
            )
        made = self.replaced(changed)
        made.budget = check_budget(budget, noise_budget)
        return made

    def replaced(self, units: Mapping[str, UnitProfile]) -> ProfileReport:
        """The same report with other profiles of these units."""
        made = copy(self)
        made._units = {**self._units, **units}  # noqa: SLF001 - it is one of our own kind
        return made

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, from which `from_json` makes the report again."""
        return {
            "version": REPORT_VERSION,
            "basis": self.basis,
            "base": self.base,
            "recipes": [
                name if RECIPES.get(name) == recipe else recipe.to_json() for name, recipe in self._by_name.items()
            ],
            "batches": self.batches,
            "loss": self.loss,
            "skipped": list(self.skipped),
            "native": list(self.native),
            "budget": None if self.budget is None else {"loss": self.budget.loss, "noise": self.budget.noise},
            "verification": None if self.verification is None else self.verification.to_json(),
            "units": {name: unit.to_json() for name, unit in self._units.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProfileReport:
        """The report that `to_json` wrote; `PlanError` for another version, or anything else."""
        if not isinstance(data, Mapping) or "units" not in data:
            passed = f"a profile report that is a {type(data).__name__} without units"
            raise PlanError(
                explain(passed, "what ProfileReport.to_json gives", "Profile the model, and save the report")
            )
        if data.get("version") != REPORT_VERSION:
            passed = f"a profile of version {data.get('version')!r}"
            raise PlanError(explain(passed, f"version {REPORT_VERSION}", "Profile the model again"))
        budget, checked = data["budget"], data["verification"]
        return cls(
            {name: UnitProfile.from_json(unit) for name, unit in data["units"].items()},
            basis=data["basis"],
            base=data["base"],
            recipes=[recipe if isinstance(recipe, str) else Recipe.from_json(recipe) for recipe in data["recipes"]],
            batches=data["batches"],
            loss=data["loss"],
            skipped=data["skipped"],
            native=data["native"],
            budget=None if budget is None else Budget(**budget),
            verification=None if checked is None else Verification(**checked),
        )

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ProfileReport:
        """Read a report that `save` wrote; `PlanError` if it is something else, `OSError` if it cannot be opened."""
        text = Path(path).read_bytes()
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            passed = f"{path} is not JSON ({error})"
            raise PlanError(explain(passed, "a file of ProfileReport.save", "Save the report again")) from error
        return cls.from_json(data)

    def __repr__(self) -> str:
        return f"<ProfileReport of {len(self)} units, by {self.basis}>"

    def __str__(self) -> str:
        return render_profile(self)


def _is_allocated(unit: UnitProfile) -> bool:
    return unit["not_analysed"] is None and "macs" in unit


def _costs(name: str, unit: UnitProfile) -> UnitCosts:
    predicted = {
        recipe: {
            role: Predicted(loss=values["loss"] if role is Role.FPROP else 0.0, noise=values["noise"][role.value])
            for role in Role
        }
        for recipe, values in unit["recipes"].items()
        if values["taken"]
    }
    seconds = {recipe: ms / 1e3 for recipe, ms in unit.get("milliseconds", {}).items()}
    return UnitCosts(name=name, macs=unit["macs"], predicted=predicted, seconds=seconds)
