"""`AdaptiveController`: which recipe each layer should run in now, from what probes measured and the loss did.

Pure: it is fed numbers and gives decisions, so that every rule can be tested without a model, and processes that are
fed the same numbers decide the same. What it decides is put in force by `trainer.adaptive`.

Lowering is slow and raising is fast. A layer is lowered when the allocation within the budgets wants it, several times
in a row, when what it saves is several times what it costs, and when no hard limit speaks against it. It is raised as
soon as one of these no longer holds beyond doubt, or a guard fires; after a guard it stays raised for a time that
doubles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek_mp.controller.limits import is_crowded_out, violations
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.controller.spikes import Gradient, Spikes
from deepseek_mp.controller.trend import LossTrend
from deepseek_mp.precision import RECIPES, Decision, Operand, Reason, Recipe, Role
from deepseek_mp.precision.allocation import Budget
from deepseek_mp.precision.composite import with_roles
from deepseek_mp.precision.planning import Predicted, UnitCosts, choice_for, choices_of, plan_for, speed_of
from deepseek_mp.sensitivity import Measured, UnitReading
from deepseek_mp.sensitivity.prediction import Predictor

SURELY = 1.25
"""A budget must be exceeded by this to raise layers for it: budgets are predictions."""
KURTOSIS_GROWTH = 4.0
"""Growth of an input's kurtosis since its layer was lowered that raises it: outliers foretell trouble, as the FOG
recipes of FP8 training found. Only where they do harm: small values begin to be lost for them, or the layer alone costs
the whole budget. Activations that grow sparse, as they do in healthy training, have as large a kurtosis."""
MEMORY = 4
"""Batches that count as the past when a new probe joins: readings follow the model as it changes."""
WRONG = 2.0
"""A true rise of the loss above so many times the predicted one halves the budgets."""
DOUBT = 3.0
"""Standard errors that one batch may be off by chance."""
SURE_SLOPE = 3.0
"""Standard errors by which the loss may fall faster than it seems to."""
SMALLEST_SCALE = 0.125


@dataclass(frozen=True, kw_only=True)
class AdaptiveUnit:
    """What is known of a layer beforehand."""

    macs: float
    seconds: Mapping[str, float]
    """Measured time of its calls in a step, by recipe; empty where nothing was timed."""
    recipes: tuple[str, ...]
    """What it can be lowered to."""


@dataclass
class UnitState:
    """Where a layer stands."""

    recipe: str
    votes: int = 0
    locked_until: int = 0
    patience: int = 0
    kurtosis: float | None = None
    """Of its input, when it was lowered."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a recipe is no choice for a layer now."""

    reason: Reason
    rule: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The loss of one batch in the plan in force and in FP32."""

    loss: float
    exact: float
    standard_error: float
    """Of the change in one batch, by the first order's scatter: what chance decides."""


@dataclass
class AdaptiveController:
    """Fed by `learn`, `see` and `compare`; asked by `decide`. Decisions are in force when they are returned."""

    units: Mapping[str, AdaptiveUnit]
    base: Recipe
    settings: AdaptiveSettings
    total_steps: int | None = None
    states: dict[str, UnitState] = field(default_factory=dict)
    readings: dict[str, UnitReading] = field(default_factory=dict)
    probes: int = 0
    scale: float = 1.0
    """Of the budgets; below one after they proved too generous."""
    loss: float = 0.0
    curvature: float = 1.0
    allocated: bool = False
    """Whether there was a first allocation that lowered anything."""
    trend: LossTrend = field(default_factory=LossTrend)
    spikes: Spikes = field(default_factory=Spikes)
    next_decision: int = 0
    refusals: dict[str, dict[str, str]] = field(default_factory=dict)
    """Layer -> recipe -> why it was no choice when decisions were made last."""

    def __post_init__(self) -> None:
        for name in self.units:
            self.states.setdefault(name, UnitState(recipe=self.base.name, patience=self.settings.patience))
        self.next_decision = max(self.next_decision, self.settings.warm_up)

    # -- what is fed ------------------------------------------------------------------------------

    def learn(self, measured: Measured, step: int) -> list[Decision]:
        """A probe's measurements. What they say of a layer that is lowered may raise it at once: see `_alarming`."""
        made: list[Decision] = []
        if not math.isfinite(measured.loss):
            return made
        self.loss, self.curvature = measured.loss, measured.curvature
        for name, new in measured.readings.items():
            if name not in self.units or not _is_finite(new):
                continue
            known = self.readings.get(name)
            if known is not None and known.effects.keys() == new.effects.keys():
                new = replace(known, batches=min(known.batches, MEMORY), calls=min(known.calls, MEMORY)).joined(new)
            self.readings[name] = new
            raised = self._alarming(name, measured.readings[name], step)
            made += [] if raised is None else [raised]
        self.probes += 1
        return made

    def _alarming(self, name: str, seen: UnitReading, step: int) -> Decision | None:
        """The raise of a layer whose tensors break a hard limit, or whose input's outliers grew, in this very probe.

        A limit must also be broken in the mean with the probes before: of a sample one value in a hundred, of one
        batch, says nothing. What is five times the limit breaks it in the mean too, so nothing grave waits.
        """
        state = self.states[name]
        if not self._is_lowered(state):
            return None
        own, _, named = state.recipe.rstrip("]").partition("[")
        roles = [Role(role) for role in named.split("+")] if named else list(Role)
        now, mean = seen.effects.get(own), self.readings[name].effects.get(own)
        if now is None or mean is None:
            return None
        kurtosis = seen.spreads[Operand.INPUT]["kurtosis"]
        if state.kurtosis is None:
            state.kurtosis = kurtosis  # lowered before anything was measured
        allowed = self.settings.loss_budget * self.scale * abs(self.loss)
        does_harm = is_crowded_out(now, RECIPES[own], roles) or now.loss_change > allowed
        if state.kurtosis and kurtosis > KURTOSIS_GROWTH * state.kurtosis and does_harm:
            evidence = {"guard": "kurtosis", "kurtosis": kurtosis, "when_lowered": state.kurtosis, "step": step}
            return self._guarded(name, step, "outliers grow in its input", evidence)
        words = [w for role in roles for w in violations(now, RECIPES[own], role)]
        if words and any(any(violations(mean, RECIPES[own], role)) for role in roles):
            evidence = {"guard": "limits", "step": step}
            return self._guarded(name, step, "; ".join(dict.fromkeys(words)), evidence)
        return None

    def see(self, step: int, loss: float, *, applied: bool, first_bad_module: str | None = None) -> list[Decision]:
        """The outcome of a step: a guard may raise layers."""
        if not applied:
            return self._raise_guilty(step, first_bad_module)
        if not self.trend.see(step, loss):
            return []
        evidence = {"guard": "loss_spike", "step": step, "loss": loss}
        return [self._guarded(name, step, "the loss jumped while it was lowered", evidence) for name in self.lowered]

    def see_gradients(self, step: int, seen: Mapping[str, Gradient]) -> list[Decision]:
        """The gradients of an applied step, by layer: one that spikes raises its layer for a short time."""
        return [
            self._held(spike.layer, self.spikes.held[spike.layer], spike.words, {**spike.evidence, "step": step})
            for spike in self.spikes.see(step, seen, self.lowered, units=len(self.units))
        ]

    def compare(self, step: int, found: Comparison) -> Decision | None:
        """The true rise of the loss by all lowered layers together: adjusts the budgets, and says so."""
        if not math.isfinite(found.exact) or not math.isfinite(found.standard_error):
            return None
        true = found.loss - found.exact
        predicted = self._spent()[0] * abs(self.loss)
        doubt = DOUBT * found.standard_error
        wrong = not math.isfinite(found.loss) or true > WRONG * predicted + doubt
        before = self.scale
        self.scale = max(SMALLEST_SCALE, self.scale / 2) if wrong else min(1.0, self.scale * SURELY)
        evidence = {
            "step": step,
            "true_rise": true,
            "predicted_rise": predicted,
            "doubt": doubt,
            "loss": found.loss,
            "budget_scale": self.scale,
        }
        if self.scale == before and not wrong:
            return None
        words = "rose by more than twice what was predicted" if wrong else "rose no more than predicted"
        name = self.base.name
        return Decision(
            layer="", old=name, new=name, reason=Reason.COMPARED, detail=f"the loss {words}", evidence=_plain(evidence)
        )

    # -- what is asked ----------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether `decide` is to be called: there is something to decide by, and it is time."""
        return step >= self.next_decision and self.probes >= 2 and bool(self.readings)

    def decide(self, step: int) -> list[Decision]:
        """The layers whose recipe changes, each with its evidence."""
        self.next_decision = step + self.settings.interval(self.total_steps)
        predictor = Predictor(self.readings, self.loss, curvature=self.curvature)
        names = [name for name in self.units if name in self.readings]
        refused: dict[str, dict[str, Refusal]] = {}
        costs = {name: self._costs(name, predictor, step, refused) for name in names}
        recipes = [RECIPES[name] for name in dict.fromkeys(r for name in names for r in self.units[name].recipes)]
        budget = Budget(loss=self.settings.loss_budget * self.scale, noise=self.settings.noise_budget * self.scale)
        plan, found = plan_for(list(costs.values()), recipes, self.base, budget, by_role=self.settings.by_role)
        if found is None:
            return []
        wanted = {decision.layer: decision for decision in plan.decisions}
        over = self._exceeds(costs, recipes, budget)
        changes = [self._raised(name, wanted[name], refused, over=over, step=step) for name in names]
        made = [change for change in changes if change is not None]
        made += self._lowered([wanted[name] for name in names], {change.layer for change in made}, step)
        self.allocated = self.allocated or bool(made)
        return made

    @property
    def lowered(self) -> list[str]:
        """The layers that run lower than the base now."""
        return [name for name, state in self.states.items() if self._is_lowered(state)]

    def recipe_of(self, name: str) -> str:
        """The recipe that the layer is to run in."""
        return self.states[name].recipe

    # -- raising ----------------------------------------------------------------------------------

    def _raised(
        self, name: str, wanted: Decision, refused: Mapping[str, Mapping[str, Refusal]], *, over: bool, step: int
    ) -> Decision | None:
        state = self.states[name]
        if not self._is_lowered(state):
            return None
        why = refused.get(name, {}).get(state.recipe.split("[")[0])
        if why is not None:
            # The allocation left the recipe out; where it wants another that is no lower, that will do.
            other = (
                wanted.new != state.recipe
                and self.base.name != wanted.new
                and _speed(wanted.new) <= _speed(state.recipe)
            )
            state.locked_until = step + self.settings.patience
            evidence = {"step": step, "rule": why.rule}
            return self._moved(name, wanted.new if other else self.base.name, why.reason, why.words, evidence)
        if over and wanted.new != state.recipe and _speed(wanted.new) <= _speed(state.recipe):
            state.locked_until = step + self.settings.patience
            return self._moved(name, wanted.new, Reason.ALLOCATED, wanted.detail, {**wanted.evidence, "step": step})
        return None

    def _raise_guilty(self, step: int, module: str | None) -> list[Decision]:
        """The layer that made the first bad number, before the loss scale is cut for all of them."""
        if module is None or module not in self.states or not self._is_lowered(self.states[module]):
            return []
        evidence = {"guard": "non_finite", "step": step, "first_bad_module": module}
        return [self._guarded(module, step, "it made the first number that was not finite", evidence)]

    def _guarded(self, name: str, step: int, why: str, evidence: dict[str, Any]) -> Decision:
        state = self.states[name]
        until = step + state.patience
        state.patience = min(2 * state.patience, self.settings.longest_patience)
        return self._held(name, until, why, evidence)

    def _held(self, name: str, until: int, why: str, evidence: Mapping[str, Any]) -> Decision:
        """A raise by a guard, to the base, where the layer stays at least until that step."""
        self.states[name].locked_until = until
        return self._moved(name, self.base.name, Reason.GUARDED, why, {**evidence, "locked_until": until})

    # -- lowering ---------------------------------------------------------------------------------

    def _lowered(self, wanted: Sequence[Decision], changed: set[str], step: int) -> list[Decision]:
        """Those whose time has come, the ones that save most first."""
        ready = []
        for decision in wanted:
            state = self.states[decision.layer]
            lower = _speed(decision.new) > _speed(state.recipe) and _speed(decision.new) > speed_of(self.base)
            if decision.layer in changed or not lower or step < state.locked_until:
                state.votes = 0
                continue
            state.votes += 1
            if not self.allocated or state.votes >= self.settings.confirmations:
                ready.append(decision)
        most = len(ready) if not self.allocated else max(1, round(self.settings.most_at_once * len(self.units)))
        ready.sort(key=lambda decision: -self._saving(decision))
        made = []
        for decision in ready[:most]:
            self.states[decision.layer].votes = 0
            self.states[decision.layer].kurtosis = self.readings[decision.layer].spreads[Operand.INPUT]["kurtosis"]
            evidence = {**decision.evidence, "step": step}
            made.append(self._moved(decision.layer, decision.new, Reason.ALLOCATED, decision.detail, evidence))
        return made

    def _saving(self, decision: Decision) -> float:
        seconds: float = decision.evidence["seconds"]
        unit = self.units[decision.layer]
        return unit.seconds.get(self.base.name, unit.macs) - seconds if unit.seconds else unit.macs

    # -- what recipes cost ------------------------------------------------------------------------

    def _costs(self, name: str, predictor: Predictor, step: int, refused: dict[str, dict[str, Refusal]]) -> UnitCosts:
        """The unit's costs, without recipes that break a limit or do not pay; why those are left out in `refused`."""
        unit, predicted = self.units[name], dict[str, dict[Role, Predicted]]()
        broken = dict[str, Refusal]()
        for recipe_name, effect in self.readings[name].effects.items():
            recipe, roles = RECIPES[recipe_name], {}
            for role in Role:
                words = "; ".join(violations(effect, recipe, role))
                loss = predictor.loss(name, recipe) if role is Role.FPROP else 0.0
                roles[role] = Predicted(loss=math.inf if words else loss, noise=predictor.noise(name, recipe, role))
                if words:
                    broken.setdefault(recipe_name, Refusal(reason=Reason.GUARDED, rule="limits", words=words))
            predicted[recipe_name] = roles
        costs = UnitCosts(name=name, macs=unit.macs, predicted=predicted, seconds=unit.seconds)
        for recipe_name in [r for r in predicted if not RECIPES[r].is_plain]:
            words = self._cost_of_products(costs, predicted[recipe_name], RECIPES[recipe_name], step)
            if words:
                broken.setdefault(recipe_name, Refusal(reason=Reason.ALLOCATED, rule="pays", words=words))
        self.refusals[name] = {r: why.words for r, why in broken.items()}
        refused[name] = {r: why for r, why in broken.items() if self._concerns(name, r, predicted[r])}
        return costs

    def _concerns(self, name: str, recipe: str, roles: Mapping[Role, Predicted]) -> bool:
        """Whether a refusal of some products of the recipe hits the layer as it runs now."""
        own, _, named = self.states[name].recipe.rstrip("]").partition("[")
        used = named.split("+") if named else [role.value for role in Role]
        return own == recipe and any(math.isinf(roles[role].loss) for role in Role if role.value in used)

    def _cost_of_products(self, costs: UnitCosts, products: dict[Role, Predicted], recipe: Recipe, step: int) -> str:
        """Rules out what does not pay of the recipe, all of it or product by product; in words why, or nothing."""
        parts = [[role] for role in Role] if self.settings.by_role else [list(Role)]
        found = ""
        for roles in parts:
            words = self._does_not_pay(costs, with_roles(recipe, roles, self.base), step)
            if words:
                products.update({role: replace(products[role], loss=math.inf) for role in roles})
                found = found or words
        return found

    def _does_not_pay(self, costs: UnitCosts, recipe: Recipe, step: int) -> str:
        """Why lowering saves less time than it costs steps; empty where it pays.

        What is lowered already stays until it costs twice as much: both numbers are estimates.
        """
        lowered, kept = choice_for(costs, recipe), choice_for(costs, self.base)
        whole = math.fsum(unit.seconds.get(self.base.name, 0.0) for unit in self.units.values())
        if not costs.seconds or not whole or math.isinf(lowered.loss):
            return ""
        saved = (kept.seconds - lowered.seconds) / whole
        cost = max(lowered.noise - kept.noise, 0.0)
        slope = self.trend.slope()
        if slope is not None:
            remaining = max((self.total_steps or 2 * step) - step, 1)
            rise = max(lowered.loss - kept.loss, 0.0) * abs(self.loss)
            # As steep as it may be: batches scatter, and a flat stretch by chance is no reason.
            steepest = max(slope.fall + SURE_SLOPE * slope.error, 1e-9 * abs(self.loss))
            cost += rise / (steepest * remaining)
        times = self.settings.pays / (2 if self._is_lowered(self.states[costs.name]) else 1)
        if saved >= times * cost:
            return ""
        return f"it would save {saved:.2%} of the time, less than {times:g} times its cost of {cost:.2%} of the steps"

    def _exceeds(self, costs: Mapping[str, UnitCosts], recipes: Sequence[Recipe], budget: Budget) -> bool:
        """Whether what is in force now exceeds a budget beyond doubt."""
        loss = noise = 0.0
        for name, unit in costs.items():
            options = choices_of(unit, recipes, self.base, by_role=self.settings.by_role)
            recipe = options.get(self.states[name].recipe)
            if recipe is not None:
                choice = choice_for(unit, recipe)
                loss += choice.loss
                noise += choice.noise
        return loss > SURELY * budget.loss or noise > SURELY * budget.noise

    def _spent(self) -> tuple[float, float]:
        """Predicted loss and its standard error of what is in force, relative."""
        loss = error = 0.0
        for name, state in self.states.items():
            effect = self.readings[name].effects.get(state.recipe.split("[")[0]) if name in self.readings else None
            if effect is not None and self._is_lowered(state) and self.loss:
                loss += effect.loss_change / abs(self.loss)
                # Of one batch: that of the mean is smaller by the root of their number.
                error += self.readings[name].batches * (effect.standard_error / self.loss) ** 2
        return loss, math.sqrt(error)

    @property
    def standard_error(self) -> float:
        """Of the change that what is in force makes in one batch, absolute."""
        return self._spent()[1] * abs(self.loss)

    def _is_lowered(self, state: UnitState) -> bool:
        return _speed(state.recipe) > speed_of(self.base)

    def _moved(self, name: str, new: str, reason: Reason, detail: str, evidence: Mapping[str, Any]) -> Decision:
        state = self.states[name]
        if reason is Reason.ALLOCATED and self.refusals.get(name):
            evidence = {**evidence, "refused": self.refusals[name]}
        made = Decision(layer=name, old=state.recipe, new=new, reason=reason, detail=detail, evidence=_plain(evidence))
        state.recipe = new
        if _speed(new) <= speed_of(self.base):
            state.kurtosis = None
        return made

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON values: a run that is resumed decides as it would have."""
        return {
            "states": {name: vars(state).copy() for name, state in self.states.items()},
            "readings": {name: reading.to_json() for name, reading in self.readings.items()},
            "probes": self.probes,
            "scale": self.scale,
            "loss": self.loss,
            "curvature": self.curvature,
            "allocated": self.allocated,
            "trend": self.trend.state_dict(),
            "spikes": self.spikes.state_dict(),
            "next_decision": self.next_decision,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in state["states"].items():
            if name in self.states:
                self.states[name] = UnitState(**values)
        self.readings = {name: UnitReading.from_json(value) for name, value in state["readings"].items()}
        for name in ("probes", "scale", "loss", "curvature", "allocated", "next_decision"):
            setattr(self, name, state[name])
        self.trend.load_state_dict(dict(state["trend"]))
        self.spikes.load_state_dict(state["spikes"])


def _is_finite(reading: UnitReading) -> bool:
    """Whether the batch that it is of had finite numbers here: one that the trainer skips says nothing.

    An infinite effect is something else: of values that would overflow in a recipe.
    """
    gradients = reading.spreads[Operand.GRAD_OUTPUT].get("non_finite", 0.0)
    return math.isfinite(reading.energy) and math.isfinite(reading.row_energy) and not gradients


def _speed(recipe: str) -> float:
    """How low a recipe is, as the mean rate of its products; of a mixture `block[dgrad+wgrad]`, between the two."""
    if "[" not in recipe:
        return speed_of(RECIPES[recipe])
    own, roles = recipe.rstrip("]").split("[")
    share = len(roles.split("+")) / len(Role)
    return share * speed_of(RECIPES[own]) + (1 - share) * speed_of(RECIPES["bf16"])


def _plain(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Evidence that JSON can hold: an infinite number as text."""
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for key, value in evidence.items()
    }
