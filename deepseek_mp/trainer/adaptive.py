"""`AdaptivePrecision`: a callback that decides each layer's recipe while training runs, by what its probes measure.

Every so many steps, before the step, it runs a probe: forward and half a backward on a part of the batch, eagerly also
where the model is compiled, on the weights and in the precision of that moment. What a probe measures is copied to the
host while training goes on, and read once it has arrived; the device is not waited for. Buffers and random numbers are
afterwards as they were. When layers change, the trainer changes its plan between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from deepseek_mp.controller.adaptive import AdaptiveController
from deepseek_mp.controller.adaptive_units import Comparison
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.controller.speed import SpeedCheck, to_compile
from deepseek_mp.costs.restore import Snapshot
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.call import batch_size, move, parse_batch, run
from deepseek_mp.nn.delayed import maxima_kept
from deepseek_mp.nn.survey import survey
from deepseek_mp.nn.unit import Unit
from deepseek_mp.ops.host_copy import HostCopy
from deepseek_mp.precision import RECIPES, Decision, PrecisionPlan, Reason, Recipe, Rule
from deepseek_mp.precision.composite import named_mixture
from deepseek_mp.profiler.layer_times import LayerCosts
from deepseek_mp.sensitivity import Arrived, Measured, Probe, Sent
from deepseek_mp.sensitivity.truth import outputs_in
from deepseek_mp.trainer.adaptive_choices import layers_to_control, measured_costs
from deepseek_mp.trainer.batch_part import part_of
from deepseek_mp.trainer.budget import run_within_budget
from deepseek_mp.trainer.callbacks import Callback
from deepseek_mp.trainer.gradient_watch import GradientWatch
from deepseek_mp.trainer.input_look import GROWTH, InputLook
from deepseek_mp.trainer.probe_clock import ProbeClock
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.trainer.storage import change_precision

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

log = logging.getLogger("deepseek_mp")
ROWS = 1024
EXACT = ("fp32", "tf32")
"""What nothing is measured of above the region: FP32 is what others differ from, TF32 has an error energy 64 times
smaller than BF16's and its range."""
FAILURES = 2
"""Probes in a row that fail: memory may be short once, a model that bears none never does."""


class AdaptivePrecision(Callback):
    """Live precision, as a callback of `MixedPrecisionTrainer`.

    Example:
        MixedPrecisionTrainer(model, "bf16", callbacks=[AdaptivePrecision()])

    Layers are lowered from the plan's region to the FP8 recipes that the device multiplies (with `emulate=True` of the
    trainer, to all that are asked for), raised again, and above a BF16 region where that harms them. Layers that a pin
    or a rule of the user's plan names are left alone. Every decision is in `decisions.jsonl` and in `decisions` here.
    """

    def __init__(self, settings: AdaptiveSettings | None = None) -> None:
        if not isinstance(settings, AdaptiveSettings | None):
            raise ConfigError(explain(f"settings={settings!r}", "an AdaptiveSettings or None", "Pass one of these"))
        self.settings = settings or AdaptiveSettings()
        self.decisions: list[Decision] = []
        self.controller: AdaptiveController | None = None
        self.disabled = ""
        """Why nothing is decided; empty while something is."""
        self._modules: Mapping[str, nn.Module] = {}
        self._timed = False
        self._measured_on: tuple[str, LayerCosts] | None = None
        """A device, and what layers cost on it."""
        self._sent: Sent | Arrived | None = None
        self._compared: HostCopy | None = None
        self._gradients: GradientWatch | None = None
        self._next_probe, self._next_comparison = 0, self.settings.compare_every
        self._interval = 0
        """Steps between probes, once their cost is known."""
        self._clock, self._speed = ProbeClock(), SpeedCheck()
        self._compiling = 0
        """Blocks that the last change was compiled for."""
        self._look = InputLook()
        self._alarms = 0
        """How many alarms of the monitor were seen."""
        self._failures = 0
        """Probes in a row that failed."""
        self._in_force = PrecisionPlan.of("fp32")
        """The plan, as far as is known here, once there is a controller."""
        self._pending: list[Decision] = []
        self._saved: Mapping[str, Any] | None = None

    def recorded_settings(self) -> dict[str, Any]:
        return self.settings.to_json()

    # -- hooks ------------------------------------------------------------------------------------

    def on_step_start(self, trainer: MixedPrecisionTrainer, batch: Any) -> None:
        """Read what has arrived, decide, and start the next probe, each when it is due."""
        self._look.active = False
        if self.disabled:
            return
        if self.controller is None:
            self._begin(trainer, batch)
        elif trainer.plan is not self._in_force and trainer.plan.digest != self._in_force.digest:
            self._disable(trainer, "the plan was changed from outside, and is left as it is")
        controller = self.controller
        if controller is None or self.disabled:
            return
        if self._gradients is None:
            self._gradients = GradientWatch(
                trainer.optimizer,
                self._modules,
                lowered=lambda: controller.lowered,
                steps=lambda: trainer.steps_applied,
                norms=lambda: trainer.scaler.norms,
            )
        step = trainer.steps_attempted
        grown = controller.grown(step, self._look.grown())
        if grown:
            self._pending += grown
            self._next_probe = step  # is the region's own format enough for it?
        if self._is_alarmed(trainer, controller):
            self._next_probe = step
        self._learn(controller, step)
        if self._compared is not None and self._compared.ready:
            now, exact = self._compared.numbers()
            self._compared = None
            found = Comparison(loss=now, exact=exact, standard_error=controller.standard_error)
            decision = controller.compare(step, found)
            if decision is not None:
                self._note(trainer, [decision])
        if controller.due(step):
            self._pending += controller.decide(step)
            self._note(trainer, controller.explained(step))
        self._put_pending_in_force(trainer)
        if step >= self._next_probe and self._sent is None:
            self._next_probe = step + self._pace()
            with self._clock.probe(trainer.device):
                self._try_probe(trainer, batch, compare=step >= self._next_comparison)
            if trainer.device.type == "cpu":  # nothing is under way: what it saw counts for this very step
                self._learn(controller, step)
                self._put_pending_in_force(trainer)
        self._watch_inputs(trainer, controller)

    def _is_alarmed(self, trainer: MixedPrecisionTrainer, controller: AdaptiveController) -> bool:
        """Whether the monitor has raised an alarm about a lowered layer since the last step: a probe will tell more."""
        raised, self._alarms = self._alarms, trainer.monitor.alarms_raised
        new = trainer.monitor.alarms_since(raised) if self._alarms > raised else ()
        return any(alarm.layer in controller.states and controller.is_lowered(alarm.layer) for alarm in new)

    def _watch_inputs(self, trainer: MixedPrecisionTrainer, controller: AdaptiveController) -> None:
        """Look at the inputs of the step that begins: not in compiled code, and where no other process must agree."""
        if self.settings.watch_inputs and not trainer.config.compile and not _several_processes():
            if trainer.stepper.veto is None:
                trainer.settle()  # so that looks and outcomes are of the same steps
                trainer.stepper.veto = self._look.veto
            limits = {name: GROWTH * size for name, size in controller.input_sizes().items()}
            self._look.watch(self._modules, limits)
            self._look.begin()

    def _learn(self, controller: AdaptiveController, step: int) -> None:
        """Show the controller what a probe measured, once it has arrived."""
        if self._sent is not None and self._sent.ready:
            self._pending += controller.learn(self._sent.read(), step)
            self._sent = None

    def on_fit_start(self, trainer: MixedPrecisionTrainer) -> None:
        """A further fit makes the run longer."""
        if self.controller is not None:
            self.controller.total_steps = trainer.planned_steps

    def on_step(self, trainer: MixedPrecisionTrainer, facts: StepFacts) -> None:
        """Show the outcome to the guards; what they raise is raised before the next step."""
        self._look.settle()
        if self.disabled:
            return
        seconds = self._clock.step()
        if self.controller is not None and seconds is not None and self._timed:
            self._time(trainer, self.controller, seconds)
        seen = {} if self._gradients is None else self._gradients.read()
        if self.controller is not None and facts.status in ("applied", "skipped"):
            self._pending += self.controller.see(
                trainer.steps_attempted,
                facts.loss,
                applied=facts.status == "applied",
                first_bad_module=facts.first_bad_module,
            )
            if facts.status == "applied" and self._gradients is not None:
                self._pending += self.controller.see_gradients(trainer.steps_attempted, seen, self._gradients.rate)

    def on_epoch_end(self, _trainer: MixedPrecisionTrainer, _epoch: int, _metrics: dict[str, Any]) -> None:
        """The time until the next step is not that of a step."""
        self._clock.forget()

    def stop_watching(self, trainer: MixedPrecisionTrainer) -> None:
        """Nothing is left on the model and the optimizer; another step begins to look again."""
        self._clock.forget()
        self._look.close()
        if trainer.has_stepper:
            trainer.stepper.veto = None
        if self._gradients is not None:
            self._gradients.remove()
            self._gradients = None

    def _time(self, trainer: MixedPrecisionTrainer, controller: AdaptiveController, seconds: float) -> None:
        """Hold the step's time against what the layers' timings promised."""
        passes = trainer.config.gradient_accumulation_steps
        gain = self._speed.see(seconds, passes * controller.promised())
        if self._speed.last is not None:
            controller.pass_seconds = self._speed.last.seconds / passes
            if self._compiling:  # a change that compiled nothing says nothing of one that does
                controller.switch_passes = self._speed.switch / self._speed.last.seconds / self._compiling
        if gain is not None:
            self._note(trainer, [controller.timed(trainer.steps_attempted, gain)])

    def _pace(self) -> int:
        """Steps until the next probe: as asked for, or more where probes would take too much of the time.

        It is fixed by the first probes that were timed and then part of the state, so that a resumed run keeps it. With
        emulation times mean nothing.
        """
        if not self._interval and self._timed:
            share = self._clock.share()
            if share is not None:
                self._interval = max(self.settings.probe_every, round(share / self.settings.probe_share))
                log.info("probes every %d steps: one takes %.2f steps", self._interval, share)
        return self._interval or self.settings.probe_every

    # -- the beginning ----------------------------------------------------------------------------

    def _begin(self, trainer: MixedPrecisionTrainer, batch: Any) -> None:
        """Find the layers to decide on, where they stand, and where a checkpoint stood."""
        try:
            layers, why = layers_to_control(
                trainer, self.settings, lambda recipes: self._costs(trainer, batch, recipes)
            )
        except Exception as error:  # noqa: BLE001 - said aloud and kept: a look at the model must not end its training
            self._failed(trainer, "layers could not be timed", error)
            return
        if not layers:
            self._disable(trainer, why)
            return
        units = {name: layer.unit for name, layer in layers.items()}
        base = RECIPES[trainer.plan.base.region]
        self._modules = {name: layer.module for name, layer in layers.items()}
        self._timed = any(unit.seconds for unit in units.values())
        self.controller = AdaptiveController(units, base, self.settings, total_steps=trainer.planned_steps)
        for name, state in self.controller.states.items():
            state.recipe = layers[name].recipe
        self._restore(trainer)
        self._in_force = trainer.plan

    def _costs(self, trainer: MixedPrecisionTrainer, batch: Any, recipes: Sequence[Recipe]) -> LayerCosts:
        """Of the checkpoint, if it is of such a device: with its times a resumed run decides as the whole one would."""
        device, saved = trainer.capabilities.device_name, self._saved
        if saved is not None and saved["costs"] is not None and saved["device"] == device:
            costs = LayerCosts(**saved["costs"])
        else:
            costs = measured_costs(trainer, self.settings, batch, recipes)
        self._measured_on = device, costs
        return costs

    def _disable(self, trainer: MixedPrecisionTrainer, why: str) -> None:
        """Nothing is decided from now on; the run's decisions say so."""
        self.disabled = why
        if self._saved is not None:  # where the run stood is no place to go back to any more
            self.decisions = [Decision.from_json(value) for value in self._saved["decisions"]]
            self._saved = None
        self.stop_watching(trainer)
        base = trainer.plan.base.name
        said = Decision(layer="", old=base, new=base, reason=Reason.ADAPT_OFF, detail=why)
        trainer.recorder.decided([said])

    def _failed(self, trainer: MixedPrecisionTrainer, what: str, error: Exception) -> None:
        message = str(error).splitlines()[0] if str(error) else ""
        if self.controller is not None:  # nobody watches over them from now on
            self._pending += self.controller.release(trainer.steps_attempted, f"{what}: {type(error).__name__}")
            self._put_pending_in_force(trainer)
        self._disable(trainer, f"{what}: {type(error).__name__}: {message}")
        log.warning("live precision is off: %s", self.disabled)

    # -- while it runs ----------------------------------------------------------------------------

    def _try_probe(self, trainer: MixedPrecisionTrainer, batch: Any, *, compare: bool) -> None:
        """A probe. Training goes on where one fails; where two in a row do, live precision is off from then on."""
        snapshot, failed = Snapshot(trainer.model, trainer.device), None
        try:
            with maxima_kept(trainer.model), torch.compiler.set_stance("force_eager"):
                self._probe(trainer, batch, snapshot, compare=compare)
        except Exception as error:  # noqa: BLE001 - said aloud and kept: a look at the model must not end its training
            self._sent, self._compared, failed = None, None, error
        finally:
            snapshot.restore()
        self._failures = 0 if failed is None else self._failures + 1
        if failed is not None and self._failures >= FAILURES:
            self._failed(trainer, "probes failed", failed)
        elif failed is not None:
            log.warning("a probe failed, and another is tried: %s: %s", type(failed).__name__, failed)

    def _probe(self, trainer: MixedPrecisionTrainer, batch: Any, snapshot: Snapshot, *, compare: bool) -> None:
        """One forward and half a backward on a part of the batch; then the same forward with lowered layers in FP32."""
        assert self.controller is not None
        call = part_of(parse_batch(move(batch, trainer.device)), self.settings.share)
        if not batch_size(call):
            return
        region = trainer.stepper.region
        base = self.controller.base.name
        recipes = {
            name: [RECIPES[r] for r in dict.fromkeys((base, *unit.recipes)) if r not in EXACT or r == base == "tf32"]
            for name, unit in self.controller.units.items()
        }
        probe = Probe(self._modules, recipes, rows=ROWS, seed=trainer.steps_attempted, both_ways=False)
        with trainer.monitor.paused(), torch.enable_grad(), region.flags(), probe.watching(call):
            with region.autocast(cache=False):
                found = run_within_budget(trainer.stepper.compute, trainer.model, call, trainer.loss_fn)
            probe.loss_is(found, trainer.loss_fn)
            probe.backward(found.loss)
        self._sent = probe.send()
        lowered = {m: RECIPES["fp32"] for n, m in self._modules.items() if self.controller.is_lowered(n)}
        if compare and lowered:
            self._next_comparison = trainer.steps_attempted + self.settings.compare_every
            snapshot.restore()
            quiet = trainer.monitor.paused(), torch.no_grad(), region.flags()
            with quiet[0], quiet[1], quiet[2], outputs_in(lowered), region.autocast(cache=False):
                exact = run(trainer.model, call, trainer.loss_fn)
            self._compared = HostCopy([found.loss, exact.loss], mean=True)

    def _put_pending_in_force(self, trainer: MixedPrecisionTrainer) -> None:
        if self._pending:
            trainer.settle()  # the last step's outcome may add to what is pending
            made, self._pending = self._pending, []
            self._note(trainer, made)
            self._compiling = self._to_compile(made)
            change_precision(trainer, self._plan(trainer, made))
            self._in_force = trainer.plan

    def _to_compile(self, made: Sequence[Decision]) -> int:
        """How many blocks these decisions, which the controller's states follow, are compiled for."""
        assert self.controller is not None
        recipes = {name: state.recipe for name, state in self.controller.states.items()}
        changed = {each.layer for each in made if each.old != each.new} & recipes.keys()
        return to_compile(self.controller.units, recipes, changed, self.controller.base.name)

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
        # Layers that stay as they are keep the reason that they had.
        reasons = {decision.layer: decision for decision in trainer.plan.decisions}
        if "" in reasons:
            reasons[""] = replace(reasons[""], new=base.name)
        reasons |= {decision.layer: decision for decision in decisions if decision.layer}
        return PrecisionPlan(
            base=base,
            rules=rules + own,
            memory_format=trainer.plan.memory_format,
            decisions=tuple(reasons.values()),
        )

    def _note(self, trainer: MixedPrecisionTrainer, decisions: list[Decision]) -> None:
        self.decisions += decisions
        trainer.recorder.decided(decisions)

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Part of the trainer's checkpoint, with what a probe measured that was not read yet. Waits for that."""
        self._clock.forget()
        if self._saved is not None:
            return dict(self._saved)
        measured = None if self._sent is None else self._sent.read()
        controller = self.controller
        device, costs = ("", None) if self._measured_on is None else self._measured_on
        return {
            "device": device,
            "costs": None if costs is None else asdict(costs),
            "measured": None if measured is None else measured.to_json(),
            "compared": None if self._compared is None else self._compared.numbers(),
            "disabled": self.disabled,
            "controller": None if controller is None else controller.state_dict(),
            "next_probe": self._next_probe,
            "interval": self._interval,
            "next_comparison": self._next_comparison,
            "pending": [decision.to_json() for decision in self._pending],
            "grown": self._look.state_dict(),
            "decisions": [decision.to_json() for decision in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; probes go on where they were."""
        self.reset()
        if state["disabled"] and state["controller"] is not None:  # it had begun, and ended
            self.disabled = state["disabled"]
            self.decisions = [Decision.from_json(value) for value in state["decisions"]]
        else:
            self._saved = state

    def reset(self) -> None:
        """Begin anew with the next step."""
        self.controller = self._sent = self._compared = self._saved = None
        self.decisions, self._pending, self.disabled = [], [], ""
        self._next_probe, self._next_comparison, self._interval = 0, self.settings.compare_every, 0
        self._speed, self._failures = SpeedCheck(), 0
        self._look.load_state_dict({})

    def _restore(self, trainer: MixedPrecisionTrainer) -> None:
        """Go on where a checkpoint stood, in its plan."""
        if self._saved is None or self.controller is None:
            return
        saved, self._saved = self._saved, None
        self._next_probe, self._next_comparison = saved["next_probe"], saved["next_comparison"]
        self._interval = saved["interval"]
        self._pending = [Decision.from_json(value) for value in saved["pending"]]
        self.decisions = [Decision.from_json(value) for value in saved["decisions"]]
        self._look.load_state_dict(saved["grown"])
        if saved["measured"] is not None:
            self._sent = Arrived(Measured.from_json(saved["measured"]))
        if saved["compared"] is not None:
            self._compared = HostCopy([torch.tensor(value) for value in saved["compared"]])
        if saved["controller"] is None:
            return
        before = {name: state.recipe for name, state in self.controller.states.items()}
        self.controller.load_state_dict(saved["controller"])
        if before != {name: state.recipe for name, state in self.controller.states.items()}:
            change_precision(trainer, self._plan(trainer, []))


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _named(decision: Decision, base: Recipe) -> list[tuple[str, Recipe]]:
    """A mixture that a decision names, as a recipe."""
    return [(decision.new, named_mixture(decision.new, base))] if "[" in decision.new else []
