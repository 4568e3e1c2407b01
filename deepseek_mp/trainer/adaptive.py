"""`AdaptivePrecision`: a callback that decides each layer's recipe while training runs, by what its probes measure.

Every so many steps, before the step, it runs a probe: forward and half a backward on a part of the batch, eagerly also
where the model is compiled, on the weights and in the precision of that moment. What a probe measures is copied to the
host while training goes on, and read once it has arrived; the device is not waited for. Buffers and random numbers are
afterwards as they were. When layers change, the trainer changes its plan between two steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from deepseek_mp.backends.low_precision import formats_of
from deepseek_mp.controller.adaptive import AdaptiveController, AdaptiveUnit, Comparison
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.costs.restore import Snapshot, preserved
from deepseek_mp.nn.assign import output_layer, why_not
from deepseek_mp.nn.call import Call, batch_size, move, parse_batch, run
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.nn.survey import survey
from deepseek_mp.nn.unit import Unit, multiplies, original_class
from deepseek_mp.precision import RECIPES, Decision, PrecisionPlan, Recipe, Rule
from deepseek_mp.precision.composite import named_mixture
from deepseek_mp.precision.planning import PAYS
from deepseek_mp.profiler.layer_times import LayerCosts, layer_costs
from deepseek_mp.sensitivity import Arrived, Measured, Probe, Sent
from deepseek_mp.sensitivity.transfer import Transfer
from deepseek_mp.sensitivity.truth import outputs_in
from deepseek_mp.trainer.callbacks import Callback
from deepseek_mp.trainer.gradient_watch import GradientWatch
from deepseek_mp.trainer.probe_clock import ProbeClock
from deepseek_mp.trainer.result import FitResult, StepFacts

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

log = logging.getLogger("deepseek_mp")
CANDIDATES = ("tensor", "row", "block")
BASES = ("bf16", "fp32", "tf32")
"""Regions beside which layers can be lowered one by one; fp16 needs a loss scale that a probe does not have."""
ROWS = 1024
LEAST_ITEMS = 8
"""Norms of the batch are another function for very few items, with other gradients."""


class AdaptivePrecision(Callback):
    """Live precision, as a callback of `MixedPrecisionTrainer`.

    Example:
        MixedPrecisionTrainer(model, "bf16", callbacks=[AdaptivePrecision()])

    Layers are lowered from the plan's region to the FP8 recipes that the device multiplies (with `emulate=True` of the
    trainer, to all that are asked for), and raised again. Layers that a pin or a rule of the user's plan names are left
    alone. Every decision is in `decisions.jsonl` and in `decisions` here.
    """

    def __init__(self, settings: AdaptiveSettings | None = None) -> None:
        self.settings = settings or AdaptiveSettings()
        self.decisions: list[Decision] = []
        self.controller: AdaptiveController | None = None
        self.disabled = ""
        """Why nothing is decided; empty while something is."""
        self._modules: dict[str, nn.Module] = {}
        self._recipes: list[Recipe] = []
        self._sent: Sent | Arrived | None = None
        self._compared: Transfer | None = None
        self._gradients: GradientWatch | None = None
        self._next_probe, self._next_comparison = 0, self.settings.compare_every
        self._interval = 0
        """Steps between probes, once their cost is known."""
        self._clock = ProbeClock()
        self._pending: list[Decision] = []
        self._saved: Mapping[str, Any] | None = None

    # -- hooks ------------------------------------------------------------------------------------

    def on_step_start(self, trainer: MixedPrecisionTrainer, batch: Any) -> None:
        """Read what has arrived, decide, and start the next probe, each when it is due."""
        if self.disabled:
            return
        if self.controller is None:
            self._begin(trainer, batch)
        controller = self.controller
        if controller is None:
            return
        if self._gradients is None:
            self._gradients = GradientWatch(
                trainer.optimizer,
                self._modules,
                lowered=lambda: controller.lowered,
                steps=lambda: trainer.steps_applied,
            )
        step = trainer.steps_attempted
        if self._sent is not None and self._sent.ready:
            self._pending += controller.learn(self._sent.read(), step)
            self._sent = None
        if self._compared is not None and self._compared.ready:
            now, exact = (float(value) for value in self._compared.read())
            self._compared = None
            found = Comparison(loss=now, exact=exact, standard_error=controller.standard_error)
            decision = controller.compare(step, found)
            if decision is not None:
                self._note(trainer, [decision])
        if controller.due(step):
            self._pending += controller.decide(step)
        if self._pending:
            trainer.settle()  # the last step's outcome may add to what is pending
            made, self._pending = self._pending, []
            self._put_in_force(trainer, made)
        if step >= self._next_probe and self._sent is None:
            self._next_probe = step + self._pace(trainer)
            with self._clock.probe(trainer.device):
                self._try_probe(trainer, batch, compare=step >= self._next_comparison)

    def on_fit_start(self, trainer: MixedPrecisionTrainer) -> None:
        """A further fit makes the run longer."""
        if self.controller is not None:
            self.controller.total_steps = trainer.planned_steps

    def on_step(self, trainer: MixedPrecisionTrainer, facts: StepFacts) -> None:
        """Show the outcome to the guards; what they raise is raised before the next step."""
        self._clock.step()
        seen = {} if self._gradients is None else self._gradients.read()
        if self.controller is not None and facts.status in ("applied", "skipped"):
            self._pending += self.controller.see(
                trainer.steps_attempted,
                facts.loss,
                applied=facts.status == "applied",
                first_bad_module=facts.first_bad_module,
            )
            if facts.status == "applied":
                self._pending += self.controller.see_gradients(trainer.steps_attempted, seen)

    def on_fit_end(self, _trainer: MixedPrecisionTrainer, _result: FitResult) -> None:
        """Nothing is left on the optimizer; a further fit begins anew."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._gradients is not None:
            self._gradients.remove()
            self._gradients = None

    def _pace(self, trainer: MixedPrecisionTrainer) -> int:
        """Steps until the next probe: as asked for, or more where probes would take too much of the time.

        It is fixed by the first probes that were timed and then part of the state, so that a resumed run keeps it. With
        emulation times mean nothing.
        """
        if not self._interval and not trainer.config.emulate:
            share = self._clock.share()
            if share is not None:
                self._interval = max(self.settings.probe_every, round(share / self.settings.probe_share))
                log.info("probes every %d steps: one takes %.2f steps", self._interval, share)
        return self._interval or self.settings.probe_every

    # -- the beginning ----------------------------------------------------------------------------

    def _begin(self, trainer: MixedPrecisionTrainer, batch: Any) -> None:
        region = trainer.plan.base.region
        if region not in BASES:
            self._disable(f"layers are not lowered one by one beside {region}")
            return
        asked = self.settings.recipes or CANDIDATES
        native = trainer.capabilities.matmul_formats
        self._recipes = [RECIPES[n] for n in asked if trainer.config.emulate or formats_of(RECIPES[n]) <= native]
        if not self._recipes:
            self._disable(f"this device multiplies in none of {', '.join(asked)}")
            return
        taken = self._takers(trainer)
        if not taken:
            self._disable("no layer can be lowered")
            return
        costs = self._costs(trainer, batch)
        units = {}
        for name, (module, recipes) in taken.items():
            seconds = {recipe: ms / 1e3 for recipe, ms in costs.milliseconds.get(name, {}).items()}
            now = _recipe_now(module, region)
            if region not in seconds:
                seconds = {}
            known = now in RECIPES and (RECIPES[now].is_plain or now in recipes)
            paying = tuple(r for r in recipes if r == now or _pays(seconds, r, region)) if known else ()
            if paying:
                units[name] = AdaptiveUnit(macs=float(costs.macs.get(name, 1)), seconds=seconds, recipes=paying)
        if not units:
            best = _closest(costs, region, taken)
            self._disable(f"no layer is {PAYS - 1:.0%} faster in {', '.join(asked)} than in {region}{best}")
            return
        self._modules = {name: module for name, (module, _) in taken.items() if name in units}
        self.controller = AdaptiveController(units, RECIPES[region], self.settings, total_steps=trainer.planned_steps)
        for name, state in self.controller.states.items():
            state.recipe = _recipe_now(self._modules[name], region)
        self._restore(trainer)

    def _takers(self, trainer: MixedPrecisionTrainer) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
        """The layers that can be lowered, and to what."""
        found = survey(trainer.model)
        last = output_layer(trainer.model, found)
        mode = trainer.config.precision_mode
        rules = [Rule(pattern=p, recipe=r) for p, r in (trainer.config.pin or {}).items()]  # type: ignore[arg-type]
        rules += mode.rules if isinstance(mode, PrecisionPlan) else ()
        taken = {}
        for name, module in found.units.items():
            if not multiplies(original_class(module)) or any(rule.matches(name) for rule in rules):
                continue
            recipes = [r.name for r in self._recipes if why_not(r, module, is_output=name == last) is None]
            if recipes:
                taken[name] = module, tuple(recipes)
        return taken

    def _costs(self, trainer: MixedPrecisionTrainer, batch: Any) -> LayerCosts:
        """Measured times of the layers; with emulation multiply-adds only, since its times mean nothing."""
        call = parse_batch(move(batch, trainer.device))
        region = trainer.stepper.region

        def forward() -> Tensor:
            with region.autocast(cache=False):
                return run(trainer.model, call, trainer.loss_fn).loss

        recipes = [RECIPES[region.format], *self._recipes]
        quiet = trainer.monitor.paused(), torch.compiler.set_stance("force_eager"), _maxima_kept(trainer.model)
        with preserved(trainer.model, trainer.device), region.flags(), quiet[0], quiet[1], quiet[2]:
            return layer_costs(
                trainer.model,
                forward,
                recipes,
                trainer.capabilities,
                trainer.device,
                timed=not trainer.config.emulate,
                progress=lambda share: None,
            )

    def _disable(self, why: str) -> None:
        self.disabled = why
        self._stop_watching()
        log.info("live precision is off: %s", why)

    # -- while it runs ----------------------------------------------------------------------------

    def _try_probe(self, trainer: MixedPrecisionTrainer, batch: Any, *, compare: bool) -> None:
        """A probe; where the model does not bear one, live precision is off from then on, and training goes on."""
        snapshot = Snapshot(trainer.model, trainer.device)
        try:
            with _maxima_kept(trainer.model), torch.compiler.set_stance("force_eager"):
                self._probe(trainer, batch, snapshot, compare=compare)
        except Exception as error:  # noqa: BLE001 - said aloud and kept: a look at the model must not end its training
            self._sent = self._compared = None
            self._disable(f"a probe failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            log.warning("live precision is off: %s", self.disabled)
        finally:
            snapshot.restore()

    def _probe(self, trainer: MixedPrecisionTrainer, batch: Any, snapshot: Snapshot, *, compare: bool) -> None:
        """One forward and half a backward on a part of the batch; then the same forward with lowered layers in FP32."""
        assert self.controller is not None
        call = part_of(parse_batch(move(batch, trainer.device)), self.settings.share)
        if not batch_size(call):
            return
        region = trainer.stepper.region
        recipes = {name: [RECIPES[r] for r in unit.recipes] for name, unit in self.controller.units.items()}
        probe = Probe(self._modules, recipes, rows=ROWS, seed=trainer.steps_attempted, both_ways=False)
        with trainer.monitor.paused(), torch.enable_grad(), region.flags(), probe.watching(call):
            with region.autocast(cache=False):
                found = run(trainer.model, call, trainer.loss_fn)
            probe.loss_is(found, trainer.loss_fn)
            probe.backward(found.loss)
        self._sent = probe.send()
        states = self.controller.states
        lowered = {
            m: RECIPES["fp32"] for n, m in self._modules.items() if states[n].recipe != self.controller.base.name
        }
        if compare and lowered:
            self._next_comparison = trainer.steps_attempted + self.settings.compare_every
            snapshot.restore()
            quiet = trainer.monitor.paused(), torch.no_grad(), region.flags()
            with quiet[0], quiet[1], quiet[2], outputs_in(lowered), region.autocast(cache=False):
                exact = run(trainer.model, call, trainer.loss_fn)
            self._compared = Transfer([found.loss, exact.loss])

    def _put_in_force(self, trainer: MixedPrecisionTrainer, decisions: list[Decision]) -> None:
        assert self.controller is not None
        self._note(trainer, decisions)
        trainer.change_plan(self._plan(trainer, decisions))

    def _plan(self, trainer: MixedPrecisionTrainer, decisions: list[Decision]) -> PrecisionPlan:
        """The plan of the controller's states: a rule for every layer that is not in the base."""
        assert self.controller is not None
        mode, base = trainer.config.precision_mode, self.controller.base
        options = {name: recipe for decision in self.decisions for name, recipe in _named(decision, base)}
        rules = tuple(
            Rule(pattern=name, recipe=options.get(state.recipe) or RECIPES[state.recipe])
            for name, state in self.controller.states.items()
            if state.recipe != base.name
        )
        own = mode.rules if isinstance(mode, PrecisionPlan) else ()
        # What runs in a recipe of its own and is not decided on keeps it, also where it came with the plan's base.
        own += tuple(
            Rule(pattern=name, recipe=module.unit_precision.recipe)
            for name, module in survey(trainer.model).units.items()
            if name not in self.controller.states
            and isinstance(module, Unit)
            and not module.unit_precision.recipe.is_plain
        )
        return PrecisionPlan(
            base=base,
            rules=rules + own,
            memory_format=trainer.plan.memory_format,
            decisions=tuple(decision for decision in decisions if decision.layer),
        )

    def _note(self, trainer: MixedPrecisionTrainer, decisions: list[Decision]) -> None:
        self.decisions += decisions
        trainer.recorder.decided(decisions)

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Part of the trainer's checkpoint, with what a probe measured that was not read yet. Waits for that."""
        if self._saved is not None:
            return dict(self._saved)
        measured = None if self._sent is None else self._sent.read()
        return {
            "measured": None if measured is None else measured.to_json(),
            "compared": None if self._compared is None else [float(value) for value in self._compared.read()],
            "disabled": self.disabled,
            "controller": None if self.controller is None else self.controller.state_dict(),
            "next_probe": self._next_probe,
            "interval": self._interval,
            "next_comparison": self._next_comparison,
            "pending": [decision.to_json() for decision in self._pending],
            "decisions": [decision.to_json() for decision in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved = state
        self._stop_watching()
        self.controller = self._sent = self._compared = None
        self.disabled = ""

    def _restore(self, trainer: MixedPrecisionTrainer) -> None:
        """Go on where a checkpoint stood, in its plan."""
        if self._saved is None or self.controller is None:
            return
        saved, self._saved = self._saved, None
        self._next_probe, self._next_comparison = saved["next_probe"], saved["next_comparison"]
        self._interval = saved["interval"]
        self._pending = [Decision.from_json(value) for value in saved["pending"]]
        self.decisions = [Decision.from_json(value) for value in saved["decisions"]]
        if saved["measured"] is not None:
            self._sent = Arrived(Measured.from_json(saved["measured"]))
        if saved["compared"] is not None:
            self._compared = Transfer([torch.tensor(value) for value in saved["compared"]])
        if saved["disabled"]:
            self._disable(saved["disabled"])
        if saved["controller"] is None:
            return
        before = {name: state.recipe for name, state in self.controller.states.items()}
        self.controller.load_state_dict(saved["controller"])
        if before != {name: state.recipe for name, state in self.controller.states.items()}:
            trainer.change_plan(self._plan(trainer, []))


def _pays(seconds: Mapping[str, float], recipe: str, region: str) -> bool:
    """Whether the recipe was measured to be faster by a margin, or nothing was measured at all."""
    return not seconds or seconds.get(recipe, math.inf) * PAYS < seconds[region]


@contextmanager
def _maxima_kept(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, delayed scaling has seen nothing of it."""
    found = [amax for scales in scales_of(model) for amax in scales.amax]
    kept = [amax.clone() for amax in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for amax, before in zip(found, kept, strict=True):
                amax.copy_(before)


def _closest(costs: LayerCosts, region: str, taken: Mapping[str, tuple[nn.Module, tuple[str, ...]]]) -> str:
    """The layer that comes closest to gaining, with its times, in words."""
    ratios = {
        (name, recipe): costs.milliseconds[name][recipe] / costs.milliseconds[name][region]
        for name, (_, recipes) in taken.items()
        for recipe in recipes
        if {recipe, region} <= costs.milliseconds.get(name, {}).keys()
    }
    if not ratios:
        return ""
    name, recipe = min(ratios, key=ratios.__getitem__)
    times = costs.milliseconds[name]
    return f": {name} comes closest, {times[recipe]:.3f} ms in {recipe} against {times[region]:.3f}"


def part_of(call: Call, share: float) -> Call:
    """The first items of the batch, at least `LEAST_ITEMS`.

    Only where every tensor begins with the batch's extent: a graph's edges or flattened targets mean something else.
    The whole batch otherwise.
    """
    items = batch_size(call)
    wanted = max(LEAST_ITEMS, round(share * items))
    leaves: list[Any] = []
    map_leaves((call.args, call.kwargs, call.target), leaves.append)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    packed = any(isinstance(leaf, PackedSequence) for leaf in leaves)
    if wanted >= items or packed or any(tensor.shape[0] != items for tensor in tensors):
        return call

    parts: dict[int, Tensor] = {}

    def cut(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.dim()):
            return leaf
        return parts.setdefault(id(leaf), leaf[:wanted])  # labels that are the target stay the same object

    args, kwargs, target = map_leaves((call.args, call.kwargs, call.target), cut)
    return replace(call, args=args, kwargs=kwargs, target=target)


def _recipe_now(module: nn.Module, region: str) -> str:
    return module.unit_precision.recipe.name if isinstance(module, Unit) else region


def _named(decision: Decision, base: Recipe) -> list[tuple[str, Recipe]]:
    """A mixture that a decision names, as a recipe."""
    return [(decision.new, named_mixture(decision.new, base))] if "[" in decision.new else []
