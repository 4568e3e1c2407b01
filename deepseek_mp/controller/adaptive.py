"""`AdaptiveController`: which recipe each layer should run in now, from what probes measured and the loss did.

Pure: it is fed numbers and gives decisions, so that every rule can be tested without a model, and processes that are
fed the same numbers decide the same. What it decides is put in force by `trainer.adaptive`.

Lowering is slow and raising is fast. A layer is lowered when the allocation within the budgets wants it, several times
in a row, when what it saves is several times what it costs, and when no hard limit speaks against it. It is raised as
soon as one of these no longer holds beyond doubt, or a guard fires; after a guard it stays raised for a time that
doubles. Where the base itself harms a layer it goes above the base (`controller.region`), and comes back as slowly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek_mp.controller import outliers
from deepseek_mp.controller.adaptive_units import AdaptiveUnit, Comparison, UnitState, as_past, is_finite, plain
from deepseek_mp.controller.choice_costs import CostRules, Judged, in_force
from deepseek_mp.controller.height import height, height_of, parts_of
from deepseek_mp.controller.limits import broken
from deepseek_mp.controller.region import HARM_WITH_ALARM, SUDDEN_HARM, harbour, shares
from deepseek_mp.controller.settings import OBJECTIVES, AdaptiveSettings
from deepseek_mp.controller.speed import Gain, compiled_with, to_compile
from deepseek_mp.controller.spikes import Gradient, Spikes
from deepseek_mp.controller.trend import LossTrend
from deepseek_mp.precision import RECIPES, Decision, Operand, Reason, Recipe, Role
from deepseek_mp.precision.allocation import Budget
from deepseek_mp.precision.planning import UnitCosts, plan_for
from deepseek_mp.sensitivity import Measured, UnitReading
from deepseek_mp.sensitivity.prediction import Predictor

SURELY = 1.25
"""A budget must be exceeded by this to raise layers for it: budgets are predictions."""
MEMORY = 4
"""Batches that count as the past when a new probe joins: readings follow the model as it changes."""
WRONG = 2.0
"""A true rise of the loss above so many times the predicted one halves the budgets."""
DOUBT = 3.0
"""Standard errors that one batch may be off by chance."""
SMALLEST_SCALE = 0.125


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
    kept: float = 1.0
    """How much of what the layers' timings promise a step was seen to save; 0 or less: it became no faster."""
    pass_seconds: float | None = None
    """Time of a forward and backward with its share of the step, once steps were timed."""
    switch_passes: float = 0.0
    """How many of those a change was last seen to cost for each block that code was compiled for; see `to_compile`."""
    is_explained: bool = False
    """Whether it was said why layers were not lowered."""
    _wanted: dict[str, Decision] = field(default_factory=dict)
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
        readings = {n: new for n, new in measured.readings.items() if n in self.units and is_finite(new)}
        alone = Predictor(readings, measured.loss, curvature=measured.curvature)
        for name, new in readings.items():
            past = as_past(self.readings[name], MEMORY) if name in self.readings else None
            if past is not None and past.effects.keys() == new.effects.keys():
                new = past.joined(new)
            raised = self._alarming(name, alone, new, step)
            if raised is not None or self.states[name].alarmed:
                new = readings[name]  # what was before is no mean of what is now
            self.states[name].alarmed = False
            made += [] if raised is None else [raised]
            self.readings[name] = new
        self.probes += 1
        return made

    def _alarming(self, name: str, alone: Predictor, mean: UnitReading, step: int) -> Decision | None:
        """The raise of a layer for what this very probe says: the base itself harms it, its range does not hold, a hard
        limit is broken, or outliers grew in its input. It is raised above the base where the probe says it needs that.

        A limit must also be broken in the mean with the probes before: of a sample one value in a hundred, of one
        batch, says nothing. What is five times the limit breaks it in the mean too, so nothing grave waits.
        """
        state, unit, seen = self.states[name], self.units[name], alone.readings[name]
        found = shares(name, alone, self.settings)
        harm = found.of.get(self.base.name, 0.0)
        costs = UnitCosts(name=name, macs=unit.macs, predicted={}, seconds=unit.seconds)
        above = harbour(costs, unit.recipes, self.base, found) if harm > HARM_WITH_ALARM else ""
        enough = harm > SUDDEN_HARM or state.alarmed
        if above and enough and self._height(state.recipe) <= height(self.base):
            words = f"{self.base.name} would take {harm:.1%} of a budget here"
            return self._locked(
                name, above, Reason.REGION_HARMS, words, {"guard": "region", "share": harm, "step": step}
            )
        if state.recipe in found.unsafe and self._is_risky(name):
            return self._guarded(name, step, found.unsafe[state.recipe], {"guard": "range"}, above)
        if not self.is_lowered(name):
            return None
        evidence = outliers.grown(state, seen.spreads[Operand.INPUT]["kurtosis"])
        own, roles = parts_of(state.recipe)
        if own not in seen.effects:
            return None
        budget = self.settings.loss_budget * self.scale * abs(self.loss)
        harmed = outliers.do_harm(state, seen.effects[own].loss_change, budget, are_grown=bool(evidence))
        if evidence and (above or harmed):
            return self._guarded(name, step, "outliers grow in its input", {**evidence, "share": harm}, above)
        words = broken(seen.effects[own], RECIPES[own], roles)
        if words and broken(mean.effects[own], RECIPES[own], roles):
            return self._guarded(name, step, words, {"guard": "limits", "share": harm}, above)
        return None

    def see(self, step: int, loss: float, *, applied: bool, first_bad_module: str | None = None) -> list[Decision]:
        """The outcome of a step: a guard may raise layers."""
        if not applied:
            return self._raise_guilty(step, first_bad_module)
        if not self.trend.see(step, loss):
            return []
        evidence, words = {"guard": "loss_spike", "loss": loss}, "the loss jumped while it was lowered"
        return [self._guarded(name, step, words, evidence) for name in self.lowered]

    def grown(self, step: int, largest: Mapping[str, float]) -> list[Decision]:
        """Inputs of lowered layers that were found far larger than in the probes: these layers are raised."""
        return [
            self._guarded(name, step, "its input is far larger than in the probes", {"guard": "input", "amax": size})
            for name, size in largest.items()
            if self.is_lowered(name)
        ]

    def input_sizes(self) -> dict[str, float]:
        """The largest magnitude of each lowered layer's input in the last probes, where one was seen."""
        sizes = {
            name: self.readings[name].spreads[Operand.INPUT]["amax"]
            for name in self.states
            if name in self.readings and self.is_lowered(name)
        }
        return {name: size for name, size in sizes.items() if size > 0}

    def see_gradients(self, step: int, seen: Mapping[str, Gradient], rate: float) -> list[Decision]:
        """The gradients of an applied step, by layer: one that spikes raises its layer for a short time. A learning
        rate that jumps raises all: what rounding adds grows faster then.
        """
        made, known = list[Decision](), self.spikes.rate
        if known.is_high(rate, self.settings.patience, warm=step >= self.settings.warm_up):
            evidence = {"guard": "learning_rate", "rate": rate, "highest": known.highest}
            words = f"the learning rate is {rate:.3g}, {known.highest:.3g} at most before"
            made = [self._guarded(name, step, words, evidence) for name in self.lowered]
        spikes = self.spikes.see(step, seen, self.lowered, units=len(self.units))
        for spike in spikes:
            evidence, until = {**spike.evidence, "step": step}, self.spikes.held[spike.layer]
            made.append(self._held(spike.layer, self.base.name, until, Reason.GUARDED, spike.words, evidence))
        for spike in spikes:
            words = f"raised with {spike.layer}: their block is compiled for {self.base.name}"
            evidence, until = {"guard": "block", "step": step}, self.spikes.held[spike.layer]
            for name in compiled_with(self.units, {spike.layer}, self.lowered):
                made.append(self._held(name, self.base.name, until, Reason.GUARDED, words, evidence))
        return made

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
            layer="", old=name, new=name, reason=Reason.COMPARED, detail=f"the loss {words}", evidence=plain(evidence)
        )

    def timed(self, step: int, gain: Gain) -> Decision:
        """What a change did to the step's time. Decisions count on that from now on; one is due if it was nothing."""
        self.kept = min(1.0, gain.kept)
        self.next_decision = self.next_decision if gain.kept > 0 else step
        return gain.decision(self.base.name, step)

    # -- what is asked ----------------------------------------------------------------------------

    def promised(self) -> float:
        """Seconds that what is lowered saves in a forward and backward, by the layers' timings."""
        return math.fsum(self._saved(name, state.recipe) for name, state in self.states.items())

    def _saved(self, name: str, recipe: str) -> float:
        """Seconds that a layer saves in this recipe, by its timings; 0 where that is not known."""
        seconds = self.units[name].seconds
        own, roles = parts_of(recipe)
        if not {own, self.base.name} <= seconds.keys():
            return 0.0
        return len(roles) / len(Role) * (seconds[self.base.name] - seconds[own])

    def due(self, step: int) -> bool:
        """Whether `decide` is to be called: there is something to decide by, and it is time."""
        return step >= self.next_decision and self.probes >= 2 and bool(self.readings)

    def decide(self, step: int) -> list[Decision]:
        """The layers whose recipe changes, each with its evidence."""
        self.next_decision = step + self.settings.interval(self.total_steps)
        judged = self._judged(step)
        costs = [found.costs for found in judged.values()]
        recipes = [RECIPES[name] for name in dict.fromkeys(r for name in judged for r in self.units[name].recipes)]
        budget = self._budget(judged)
        objective, by_role = OBJECTIVES[self.settings.objective], self.settings.by_role
        plan, found = plan_for(costs, recipes, self.base, budget, by_role=by_role, objective=objective)
        if found is None:
            return []
        self._wanted = wanted = {decision.layer: decision for decision in plan.decisions}
        self.refusals = {name: each.refused for name, each in judged.items() if each.refused}
        late = self._is_too_late(wanted.values(), step) or self.spikes.rate.steps > 0
        over = self._exceeds(judged, recipes, budget)
        stay = late and self.kept > 0
        changes = (self._raised(wanted[name], judged[name], over=over, stay=stay, step=step) for name in judged)
        made = [change for change in changes if change]
        made += [] if late else self._lowered(list(wanted.values()), {change.layer for change in made}, step)
        self.allocated = self.allocated or bool(made)
        return made

    def _is_too_late(self, wanted: Iterable[Decision], step: int) -> bool:
        """Whether what is left of the run is too short for these changes to save the time that changing takes.

        In compiled code each new combination of recipes in a block is compiled. What a layer is raised for that does
        not pay is about what it saves.
        """
        if not (self.switch_passes and self.pass_seconds):
            return False
        left = (self.total_steps or 2 * step) - step  # where nobody says how long it is: as long again
        now = {name: state.recipe for name, state in self.states.items()}
        new = {each.layer: each.new for each in wanted if each.new != now[each.layer]}
        gain = math.fsum(abs(self._saved(name, recipe) - self._saved(name, now[name])) for name, recipe in new.items())
        blocks = to_compile(self.units, now | new, new, self.base.name)
        return left * gain < blocks * self.switch_passes * self.pass_seconds

    def explained(self, step: int) -> list[Decision]:
        """Once, when there was a first decision: why the layers that it left as they are were not lowered."""
        if self.is_explained or not self._wanted:
            return []
        self.is_explained = True
        made = []
        for name, wanted in self._wanted.items():
            now = self.states[name].recipe
            if self.is_lowered(name) or now != wanted.old:
                continue
            words = "; ".join(f"{recipe}: {why}" for recipe, why in self.refusals.get(name, {}).items())
            made.append(self._moved(name, now, Reason.ALLOCATED, words or wanted.detail, {"step": step}))
        return made

    def _judged(self, step: int) -> dict[str, Judged]:
        """What recipes cost each layer that was measured."""
        rules = CostRules(
            base=self.base,
            settings=self.settings,
            predictor=Predictor(self.readings, self.loss, curvature=self.curvature),
            loss=self.loss,
            seconds=max(
                math.fsum(unit.seconds.get(self.base.name, 0.0) for unit in self.units.values()),
                self.pass_seconds or 0.0,
            ),
            kept=self.kept,
            slope=self.trend.slope(),
            remaining=max((self.total_steps or 2 * step) - step, 1),
        )
        return {
            name: rules.judge(name, unit, self.readings[name], self.states[name].recipe)
            for name, unit in self.units.items()
            if name in self.readings
        }

    def _budget(self, judged: Mapping[str, Judged]) -> Budget:
        """The budgets as they are scaled now; at least what layers cost that are not lowered: that cannot be saved."""
        least = [found.least for found in judged.values()]
        return Budget(
            loss=max(self.settings.loss_budget * self.scale, math.fsum(each.loss for each in least)),
            noise=max(self.settings.noise_budget * self.scale, math.fsum(each.noise for each in least)),
        )

    @property
    def lowered(self) -> list[str]:
        """The layers that run lower than the base now."""
        return [name for name in self.states if self.is_lowered(name)]

    # -- raising ----------------------------------------------------------------------------------

    def _raised(self, wanted: Decision, judged: Judged, *, over: bool, stay: bool, step: int) -> Decision | None:
        name, state = wanted.layer, self.states[wanted.layer]
        if judged.above and self._height(judged.above) > self._height(state.recipe):
            words = f"{self.base.name} would take {judged.harm:.1%} of a budget here"
            return self._locked(name, judged.above, Reason.REGION_HARMS, words, {**wanted.evidence, "step": step})
        if not self.is_lowered(name):
            return None
        higher = wanted.new != state.recipe and self._height(wanted.new) >= self._height(state.recipe)
        if judged.unpaid and not stay:
            # The allocation left the recipe out; where it wants another that is no lower, that will do.
            state.locked_until = step + self.settings.patience
            evidence = {"step": step, "rule": "pays"}
            new = wanted.new if higher else self.base.name
            return self._moved(name, new, Reason.ALLOCATED, judged.unpaid, evidence)
        if over and higher:
            state.locked_until = step + self.settings.patience
            return self._moved(name, wanted.new, Reason.ALLOCATED, wanted.detail, {**wanted.evidence, "step": step})
        return None

    def release(self, step: int, why: str) -> list[Decision]:
        """All lowered layers back to the base, since nothing watches over them any more."""
        return [self._moved(name, self.base.name, Reason.ADAPT_OFF, why, {"step": step}) for name in self.lowered]

    def _raise_guilty(self, step: int, module: str | None) -> list[Decision]:
        """The layer that made the first bad number, before the loss scale is cut for all of them."""
        if module is None or module not in self.states or not self._is_risky(module):
            return []
        evidence = {"guard": "non_finite", "first_bad_module": module}
        return [self._guarded(module, step, "it made the first number that was not finite", evidence)]

    def _guarded(self, name: str, step: int, why: str, evidence: dict[str, Any], above: str = "") -> Decision:
        self.states[name].alarmed = not above
        return self._locked(name, above or self.base.name, Reason.GUARDED, why, {**evidence, "step": step})

    def _locked(self, name: str, new: str, reason: Reason, why: str, evidence: dict[str, Any]) -> Decision:
        """Raised, for a time that doubles with every repetition."""
        state = self.states[name]
        until = evidence["step"] + state.patience
        state.patience = min(2 * state.patience, self.settings.longest_patience)
        return self._held(name, new, until, reason, why, evidence)

    def _held(self, name: str, new: str, until: int, reason: Reason, why: str, evidence: Mapping[str, Any]) -> Decision:
        """Raised, at least until that step."""
        self.states[name].locked_until = until
        return self._moved(name, new, reason, why, {**evidence, "locked_until": until})

    # -- lowering ---------------------------------------------------------------------------------

    def _lowered(self, wanted: Sequence[Decision], changed: set[str], step: int) -> list[Decision]:
        """Those whose time has come, the ones that save most first."""
        ready = []
        for decision in wanted:
            state = self.states[decision.layer]
            if self._height(state.recipe) > height(self.base) > self._height(decision.new):
                words = f"{self.base.name} takes little of the budgets here again"
                decision = replace(decision, new=self.base.name, detail=words, evidence={"saved_seconds": 0.0})
            lower = self._height(decision.new) < self._height(state.recipe)
            if decision.layer in changed or not lower or step < state.locked_until:
                state.votes = 0
                continue
            state.votes += 1
            if not self.allocated or state.votes >= self.settings.confirmations:
                ready.append(decision)
        most = len(ready) if not self.allocated else max(1, round(self.settings.most_at_once * len(self.units)))
        ready.sort(key=lambda decision: -self._saving(decision))
        made, chosen = [], {decision.layer for decision in ready[:most]}
        chosen |= set(compiled_with(self.units, chosen, [decision.layer for decision in ready]))
        for decision in (each for each in ready if each.layer in chosen):
            self.states[decision.layer].votes = 0
            self.states[decision.layer].kurtosis = self.readings[decision.layer].spreads[Operand.INPUT]["kurtosis"]
            evidence = {**decision.evidence, "step": step}
            made.append(self._moved(decision.layer, decision.new, Reason.ALLOCATED, decision.detail, evidence))
        return made

    def _saving(self, decision: Decision) -> float:
        unit = self.units[decision.layer]
        if self.settings.objective == "memory":
            return float(decision.evidence.get("saved_bytes", unit.inputs))
        return float(decision.evidence["saved_seconds"]) if unit.seconds else unit.macs

    # -- what is in force ------------------------------------------------------------------------

    def _exceeds(self, judged: Mapping[str, Judged], recipes: Sequence[Recipe], budget: Budget) -> bool:
        """Whether what is in force now exceeds a budget beyond doubt."""
        lowered = {name: self.states[name].recipe for name in self.lowered}
        objective, by_role = OBJECTIVES[self.settings.objective], self.settings.by_role
        now = in_force(judged, lowered, recipes, self.base, by_role=by_role, objective=objective)
        return now.loss > SURELY * budget.loss or now.noise > SURELY * budget.noise

    def _spent(self) -> tuple[float, float]:
        """Predicted loss and its standard error of what is in force, relative."""
        loss = error = 0.0
        for name, state in self.states.items():
            effect = self.readings[name].effects.get(parts_of(state.recipe)[0]) if name in self.readings else None
            if effect is not None and self.is_lowered(name) and self.loss:
                loss += effect.loss_change / abs(self.loss)
                # Of one batch: that of the mean is smaller by the root of their number.
                error += self.readings[name].batches * (effect.standard_error / self.loss) ** 2
        return loss, math.sqrt(error)

    @property
    def standard_error(self) -> float:
        """Of the change that what is in force makes in one batch, absolute."""
        return self._spent()[1] * abs(self.loss)

    def is_lowered(self, name: str) -> bool:
        """Whether the layer runs below the base now."""
        return self._height(self.states[name].recipe) < height(self.base)

    def _is_risky(self, name: str) -> bool:
        """Whether it runs in what the base could do better: lower, or with less range."""
        format = RECIPES[parts_of(self.states[name].recipe)[0]].fprop.left.format
        return self.is_lowered(name) or format.exponent_bits < self.base.fprop.left.format.exponent_bits

    def _height(self, recipe: str) -> float:
        return height_of(recipe, self.base)

    def _moved(self, name: str, new: str, reason: Reason, detail: str, evidence: Mapping[str, Any]) -> Decision:
        state = self.states[name]
        if reason is Reason.ALLOCATED and self.refusals.get(name):
            evidence = {**evidence, "refused": self.refusals[name]}
        made = Decision(layer=name, old=state.recipe, new=new, reason=reason, detail=detail, evidence=plain(evidence))
        state.recipe = new
        if not self.is_lowered(name):
            state.kurtosis = None
        return made

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON values: a run that is resumed decides as it would have."""
        return {
            **{name: getattr(self, name) for name in _NUMBERS},
            "states": {name: vars(state).copy() for name, state in self.states.items()},
            "readings": {name: reading.to_json() for name, reading in self.readings.items()},
            "trend": self.trend.state_dict(),
            "spikes": self.spikes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in state["states"].items():
            if name in self.states:
                self.states[name] = UnitState(**values)
                if parts_of(values["recipe"])[0] not in (self.base.name, *self.units[name].recipes):
                    self.states[name].recipe = self.base.name  # which nobody asks for any more
        readings = {name: UnitReading.from_json(value) for name, value in state["readings"].items()}
        self.readings = {
            name: reading
            for name, reading in readings.items()
            if name in self.units and {*self.units[name].recipes} <= reading.effects.keys() | {"fp32", "tf32"}
        }
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self.trend.load_state_dict(dict(state["trend"]))
        self.spikes.load_state_dict(state["spikes"])


_NUMBERS = (
    "probes", "scale", "loss", "curvature", "allocated", "is_explained", "next_decision", "kept", "pass_seconds",
    "switch_passes",
)  # fmt: skip
"""What of a controller is a number and part of its state."""
