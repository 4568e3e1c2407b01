"""`MixedPrecisionTrainer`: wires plan, scaler, monitor, records and checkpoints around a loop.

The trainer decides nothing about numbers itself. The plan comes from the user or from timings
(`auto.py`), the step is a transaction (`step.py`), the state is files (`checkpoint.py`); this file says
in which order they are called. The epochs of a fit are in `fitting.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from deepseek_mp import backends
from deepseek_mp.activations import ActivationRecord, ActivationSettings, BlockChoice
from deepseek_mp.controller.loss_scale import LossScalePolicy, NoLossScale, make_policy
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.costs import CostCache
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.monitor import PrecisionMonitor, Sampling
from deepseek_mp.nn import apply
from deepseek_mp.nn import call as calls
from deepseek_mp.nn.loss import LossFn
from deepseek_mp.precision import PrecisionPlan, Recipe
from deepseek_mp.trainer.adaptive import AdaptivePrecision
from deepseek_mp.trainer.adaptive_callback import adaptive_of, looks_ended, with_adaptive
from deepseek_mp.trainer.assembly import assemble_stepper, computation
from deepseek_mp.trainer.budget import blocks_of, check_budget
from deepseek_mp.trainer.callbacks import Callback, check_callbacks, overrides
from deepseek_mp.trainer.compile import check_compile
from deepseek_mp.trainer.compressed import activations_of, check_activations
from deepseek_mp.trainer.config import Compile, FusedLossOption, MemoryOption, TrainerConfig, check_extent
from deepseek_mp.trainer.confirmed_batch import ConfirmedBatch, explained
from deepseek_mp.trainer.ema import WeightAverage
from deepseek_mp.trainer.evaluation import Inference, Metric, check_metrics, evaluate, inference
from deepseek_mp.trainer.fitting import Fitting, unfinished_discarded
from deepseek_mp.trainer.fused_loss import check_fused_loss
from deepseek_mp.trainer.memory_report import MemoryReport
from deepseek_mp.trainer.memory_trials import fit_memory
from deepseek_mp.trainer.offloaded import synchronize, take_offloaded, updates_are_seen
from deepseek_mp.trainer.planning import measured_plan, named_plan, requested_plan
from deepseek_mp.trainer.position import LoaderPosition, check_loader
from deepseek_mp.trainer.progress import Progress
from deepseek_mp.trainer.recording import Recorder
from deepseek_mp.trainer.region import Region
from deepseek_mp.trainer.result import FitResult, StepFacts, StepResult
from deepseek_mp.trainer.resume import restore, resumed_plan, save
from deepseek_mp.trainer.setup import (
    align_optimizer,
    check_arguments,
    choose_device,
    make_optimizer,
    make_scaler,
    make_scheduler,
    seed_everything,
    unchanged_if_refused,
)
from deepseek_mp.trainer.step import Stepper
from deepseek_mp.trainer.trial_steps import on_what_fits
from deepseek_mp.trainer.uncopied import Uncopied
from deepseek_mp.trainer.window import Window

log = logging.getLogger("deepseek_mp")


class MixedPrecisionTrainer(Uncopied):
    """Trains a model in the best precision for the device, safely, and says what it did and why.

    Example:
        trainer = MixedPrecisionTrainer(model, precision_mode="auto")
        result = trainer.fit(train_loader, epochs=10)

    Args:
        model: any `nn.Module` with FP32 parameters. It is converted in place and moved to the device.
        precision_mode: 'auto' measures on the first batch and keeps the fastest that does not lose to
            FP32; 'fp32', 'tf32', 'hf32', 'bf16', 'fp16', 'fp8' and its recipes are obeyed; or a `PrecisionPlan`.
        loss_scale_policy: 'dynamic', 'predictive', 'static', 'none', a number, or a `LossScalePolicy`.
            In force only where the plan has fp16; otherwise the scale is 1.
        loss_fn: (output, target) -> scalar loss, or (scalar, number of items it is the mean of).
            None: the output's own `loss`, else inferred from the target's dtype, and logged.
        optimizer: an Optimizer, or parameters -> Optimizer. None: AdamW with lr 1e-3, fused.
        scheduler: an LRScheduler, or optimizer -> LRScheduler. Advances on applied steps only.
        gradient_accumulation_steps: micro-batches per optimizer step; exact for unequal ones.
        max_grad_norm: clips the L2 norm of the unscaled gradients, taken in FP32.
        ema_decay: keep an exponential average of the weights, used by `evaluate` and `predict`.
        pin: name pattern -> recipe, rules before all others: {'*.norm*': 'fp32'}.
        emulate: allow formats that the device has no units for, where PyTorch can run them.
        adapt: whether layers are lowered and raised while the model trains (docs/adaptive.md), from the plan of 'auto'
            on; `AdaptiveSettings` says how. None: with 'auto'. A precision that you name is kept.
        kernels: what runs FP8 ('reference', 'triton', 'native'), used or refused; None: the best there is.
        compile: True compiles the model and its loss, 'regional' its repeated blocks and its loss.
        fused_loss: compute cross entropy in chunks from the input of the model's last layer, so that its output is
            never held whole (docs/memory.md): 'auto' where that is possible and saves memory, True always, or refused.
            None: 'auto', but not in FP16, where it would cost a product. False: never.
        activations: keep large tensors for the backward in FP8, masks in bits; `ActivationSettings` says which.
        activation_memory_budget: share of the bytes kept for the backward; the rest is computed again, exactly, what is
            cheapest by byte first (docs/activations.md): parts of compiled code, or repeated blocks. None is 1.
        memory: GiB that a step may hold, or 'auto' for what the device has: what saves memory for the least time is
            taken, as trials with the first batch say (docs/memory.md); `trainer.memory` says what and why.
        device: where to train; None: where the model is if that is an accelerator, else the best here.
        seed: seeds Python's, NumPy's and PyTorch's generators.
        run_dir: folder for records and checkpoints; None writes nothing.
        callbacks: `Callback` objects.
        max_skipped_steps: skipped steps in a row after which training stops with `NonFiniteError`.
        checkpoint_every: applied or skipped steps between checkpoints; None: once per epoch.
        monitor_every: steps between two that `monitor` counts.
        statistics_every: calls of the model between two on which `monitor` measures a few layers; None: never.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ConfigError, PlanError, FormatError: an argument does not fit, the model is as it was.
    """

    planned_steps: int | None = None
    """Steps of the whole run, once a fit that knows has begun."""
    stopping = False
    steps_attempted = steps_applied = 0
    loader: Any = None
    memory: MemoryReport | None = None
    """What was done to fit into the `memory` asked for, from the first step on."""
    confirmed: ConfirmedBatch | None = None
    """What `find_batch_size` has seen go through."""
    _stepper: Stepper | None = None

    def __init__(
        self,
        model: nn.Module,
        precision_mode: str | PrecisionPlan = "auto",
        loss_scale_policy: str | float | LossScalePolicy = "dynamic",
        *,
        loss_fn: LossFn | None = None,
        optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Any = None,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        pin: Mapping[str, str | Recipe] | None = None,
        emulate: bool = False,
        adapt: bool | AdaptiveSettings | None = None,
        kernels: str | None = None,
        compile: Compile = False,
        fused_loss: FusedLossOption = None,
        activations: bool | ActivationSettings = False,
        activation_memory_budget: float | None = None,
        memory: MemoryOption = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        run_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        max_skipped_steps: int = 25,
        checkpoint_every: int | None = None,
        monitor_every: int = 500,
        statistics_every: int | None = 50,
        progress: bool | None = None,
    ) -> None:
        check_arguments(model, loss_fn)
        self.config = TrainerConfig.among(locals())
        self._policy = make_policy(loss_scale_policy)
        self._unused_policy = deepcopy(self._policy)  # for when fp16 comes in again
        self.model, self.loss_fn = model, loss_fn
        self.callbacks = with_adaptive(check_callbacks(callbacks), self.config)
        self._progress, self.device = progress, choose_device(model, device)
        self.capabilities, self.costs = backends.capabilities(self.device), CostCache()
        self.recorder = Recorder(run_dir, self)
        with unchanged_if_refused(model, self.device):
            check_compile(model, compile)
            check_fused_loss(self.config, loss_fn)
            check_activations(self.config)
            check_budget(model, self.config)
            plan = requested_plan(model, self.config, self.capabilities)
            self._plan = None if plan is None else self._apply(plan)
            seed_everything(seed)
            model.to(self.device)
            self.optimizer = make_optimizer(optimizer, model)
            take_offloaded(self.optimizer, model, self.config)
            self.scheduler = make_scheduler(scheduler, self.optimizer)
        sampling = None if statistics_every is None else Sampling(every=statistics_every)
        watched = self.optimizer if updates_are_seen(self.optimizer) else None
        self.monitor = PrecisionMonitor(model, watched, sample_every=None, sampling=sampling)
        self.ema = None if ema_decay is None else WeightAverage(model, ema_decay)
        self.scaler = make_scaler(self._policy, None, self.capabilities, self.device)
        self.position = LoaderPosition(self.device)
        self.history: list[dict[str, Any]] = []
        if self._plan is not None:
            self._install(self._plan)

    # -- the plan -------------------------------------------------------------------------------

    @property
    def plan(self) -> PrecisionPlan:
        """The plan in force, with one decision per layer.

        Raises:
            ConfigError: with 'auto', before the first batch has been seen.
        """
        if self._plan is None:
            raise ConfigError(
                explain(
                    "plan before anything was measured", "reading it after the first step", "Call fit or step first"
                )
            )
        return self._plan

    @property
    def adaptive(self) -> AdaptivePrecision | None:
        """Live precision, its decisions and why it is off, if it is; None: the plan stays as it is."""
        return adaptive_of(self.callbacks)

    @property
    def activations(self) -> ActivationRecord | None:
        """What the last forward kept in which form, where activations are compressed."""
        return activations_of(self)

    @property
    def recomputed_blocks(self) -> BlockChoice | None:
        """Which blocks the backward computes again, their times and bytes, under a budget without `compile`."""
        return blocks_of(self)

    def change_plan(self, plan: str | PrecisionPlan, *, pin: Mapping[str, str | Recipe] | None = None) -> PrecisionPlan:
        """Train on in another precision, from the next step on; returns the plan, now in force, with its decisions.

        Between steps, at any time. Compiled code of a plan that was in force before is found again. The loss scale
        starts anew where fp16 comes in; delayed scales start anew with every plan.

        Args:
            plan: a format, a recipe or a plan, as for the constructor, but for 'auto'.
            pin: rules put before those of the plan; without, the pins of the constructor.

        Raises:
            PlanError, FormatError: as the constructor; the plan stays what it was.
            ConfigError: before the first plan is in force, within an open accumulation window, or for 'auto'.
        """
        if self._stepper is None or self.stepper.closing or self.stepper.window.micro_batches:
            allowed = "a change between optimizer steps, once a plan is in force"
            raise ConfigError(explain("change_plan outside of that", allowed, "Call it after a step that was applied"))
        wanted = named_plan(self.model, plan, pin, self.config, self.capabilities)
        self.settle()
        with unchanged_if_refused(self.model, self.device):
            changed = self._apply(wanted)
        align_optimizer(self.optimizer)
        if ("fp16" in changed.formats) != ("fp16" in self.plan.formats):
            self.scaler = make_scaler(deepcopy(self._unused_policy), changed, self.capabilities, self.device)
        self.stepper.change_plan(Region(changed, self.device, search=True), self.scaler)
        self._plan = changed
        self.recorder.plan(changed)
        return changed

    def _apply(self, plan: PrecisionPlan) -> PrecisionPlan:
        emulate, kernels = self.config.emulate, self.config.kernels
        return apply(self.model, plan, emulate=emulate, kernels=kernels, capabilities=self.capabilities)

    def _measure(self, batch: Any) -> PrecisionPlan:
        """Choose the plan by timing the first batch."""
        with Progress(self._progress) as shown, self.monitor.paused():
            return measured_plan(self, batch, shown.stage)

    def _install(self, plan: PrecisionPlan) -> None:
        """Build everything that depends on the plan, which the model was converted to."""
        self._plan = plan
        align_optimizer(self.optimizer)
        self.scaler = make_scaler(self._policy, plan, self.capabilities, self.device)
        wants_gradients = any(overrides(c, "on_gradients") for c in self.callbacks)
        self._stepper = assemble_stepper(
            self,
            plan,
            compute=computation(self, plan),
            scaler=self.scaler,
            monitor=self.monitor,
            finished=self._finished,
            before=self._show_gradients if wants_gradients else None,
        )
        self.recorder.plan(plan)

    @property
    def has_stepper(self) -> bool:
        """Whether there is a `stepper` yet; with 'auto', from the first batch on."""
        return self._stepper is not None

    @property
    def stepper(self) -> Stepper:
        """The machinery of a step; there is one once a plan is in force."""
        assert self._stepper is not None, "plan is read before, and raises without one"
        return self._stepper

    def check_scaler(self, saved_plan: PrecisionPlan, saved: Mapping[str, Any]) -> None:
        """`LossScaleError` if a checkpoint's loss-scale state cannot continue here."""
        plan = saved_plan if self._plan is None else self._plan
        if "fp16" in plan.formats and saved["policy"] != NoLossScale.name:
            deepcopy(self._policy).load_state_dict(saved)

    def adopt_plan(self, saved_plan: PrecisionPlan, saved_scale: Mapping[str, Any]) -> Stepper:
        """Continue with a checkpoint's plan where this run would have measured one.

        A precision that this run names itself is kept: resuming is how a run changes it on purpose.
        """
        if self._plan is None:
            self._install(self._apply(resumed_plan(saved_plan, self.config.pin or {})))
        if saved_scale["policy"] == self.scaler.policy.name:
            self.scaler.load_state_dict(saved_scale)
        else:
            log.warning("the precision changed, so the loss scale starts anew (it was %s)", saved_scale)
        return self.stepper

    def _ready(self, batch: Any) -> Stepper:
        if self._stepper is None:
            small = self.config.memory is not None
            plan = on_what_fits(self._measure, batch, self.device) if small else self._measure(batch)
            self._install(self._apply(plan))
        undecided = self.config.memory is not None and self.memory is None and not self.stepper.window.micro_batches
        if undecided and calls.batch_size(calls.parse_batch(batch)):  # an empty one tells nothing
            self.memory = fit_memory(self, batch)
        return self.stepper

    # -- one step -------------------------------------------------------------------------------

    def step(self, batch: Any, *, close: bool | None = None) -> StepResult:
        """Train on one micro-batch; the optimizer steps when the accumulation window is full.

        Args:
            batch: a tensor, an (input, target) pair, or a mapping of keyword arguments.
            close: True steps the optimizer now, False not yet; None: when the window is full.

        Returns:
            A lazy result. On an accelerator, reading it waits until the device has done the step.

        Raises:
            BatchError: the batch or the loss has a form that cannot be trained on.
            NonFiniteError: too many steps in a row were skipped.
        """
        if not self.model.training:
            self.model.train()
        stepper = self._ready(batch)
        if not stepper.window.micro_batches:
            for callback in self.callbacks:
                callback.on_step_start(self, batch)
        with explained(self, batch):
            return stepper.run(batch, index=max(self.position.batch - 1, 0), close=close)

    def settle(self) -> None:
        """Wait for the last step's outcome and act on it (scheduler, average, records)."""
        if self._stepper is not None:
            self._stepper.settle()

    def _finished(self, facts: StepFacts, window: Window) -> None:
        """A window is settled: advance what advances with it, and tell everyone."""
        self.steps_attempted += 1
        if window.entries:
            self.position.stepped(window.entries[-1].index + 1)
        self.steps_applied += facts.status == "applied"
        self.recorder.step(facts, window)  # before what may raise, and with the rate that the step was made with
        if facts.status == "applied":
            if isinstance(self.scheduler, LRScheduler) and not isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step()
            if self.ema is not None:
                self.ema.update()
        for callback in self.callbacks:
            callback.on_step(self, facts)
            if facts.status == "skipped":
                callback.on_skip(self, facts, [(entry.index, entry.batch) for entry in window.entries])

    def _show_gradients(self) -> None:
        for callback in self.callbacks:
            callback.on_gradients(self)

    # -- fit ------------------------------------------------------------------------------------

    def fit(
        self,
        train_loader: Iterable[Any],
        epochs: int = 1,
        *,
        max_steps: int | None = None,
        val_loader: Iterable[Any] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        resume: str | Path | None = None,
    ) -> FitResult:
        """Train until the whole run has seen `epochs` epochs or `max_steps` applied steps.

        Args:
            train_loader: an iterable of batches, with or without a length; iterated once per epoch. In
                an epoch that an earlier fit left unfinished, what it had seen is passed over.
            epochs: of the whole run: resumed after one epoch, `epochs=2` trains one more.
            max_steps: applied optimizer steps of the whole run; a checkpoint is written where they end.
            val_loader: evaluated after each epoch.
            metrics: name -> (output, target) -> scalar tensor, the mean over a batch.
            resume: a run directory, a folder of checkpoints, or one checkpoint; the newest that
                verifies is loaded.

        Raises:
            LoaderError: the loader gave no batch.
            CheckpointError: nothing to resume from, or it is of another model.
            NonFiniteError: too many steps in a row were skipped.
        """
        check_extent(epochs, max_steps)
        check_loader(train_loader, "train_loader")
        check_loader(val_loader, "val_loader", optional=True)
        check_metrics(metrics)
        started = time.monotonic()
        self.loader, self.stopping = train_loader, False
        if resume is None:
            self.recorder.check_unused()
        else:
            restore(self, Path(resume))
        if self.position.epoch >= epochs:
            log.warning("nothing to train: the run already has %d of %d epochs", self.position.epoch, epochs)
        with self.recorder, Progress(self._progress) as shown, unfinished_discarded(self), looks_ended(self):
            fitting = Fitting(
                trainer=self,
                loader=train_loader,
                epochs=epochs,
                max_steps=max_steps,
                val_loader=val_loader,
                metrics=metrics,
                shown=shown,
            )
            self.planned_steps = fitting.planned_steps
            for callback in self.callbacks:
                callback.on_fit_start(self)
            fitting.run()
            result = fitting.result(time.monotonic() - started)
            for callback in self.callbacks:
                callback.on_fit_end(self, result)
        return result

    def stop(self) -> None:
        """End the fit under way after its step, as `max_steps` would: with a checkpoint if it has a run directory."""
        self.stopping = True

    # -- without training -----------------------------------------------------------------------

    def _inference(self) -> AbstractContextManager[Inference]:
        self.settle()
        synchronize(self.optimizer)
        region = Region(self._plan or PrecisionPlan.of("fp32"), self.device, search=False)
        return inference(self.model, region.inference, self.ema)

    def evaluate(self, loader: Iterable[Any], *, metrics: Mapping[str, Metric] | None = None) -> dict[str, float]:
        """Mean loss and metrics over a loader: {'loss': ..., name: ...}.

        Args:
            loader: batches as for `fit`.
            metrics: name -> (output, target) -> scalar tensor, the mean over a batch.

        Raises:
            LoaderError: the loader gave no batch.
        """
        check_loader(loader, "loader")
        check_metrics(metrics)
        with self._inference() as region:
            return evaluate(self.model, loader, self.loss_fn, metrics or {}, self.device, region)

    def predict(self, batch: Any) -> Any:
        """The model's output for one batch, on the device and in the format the plan gives it.

        The target, if the batch has one, is ignored.
        """
        call = calls.move(calls.parse_batch(batch), self.device)
        with self._inference() as region, region():
            return calls.invoke(self.model, call)

    def save(self, path: str | Path) -> Path:
        """Write a verified checkpoint under `path` and return its folder.

        It holds everything a bit-identical continuation needs; `model.safetensors` in it loads into the
        plain model without this package.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        if self._plan is None:
            raise ConfigError(explain("save before the first step", "saving a run whose plan is known", "Train first"))
        if self.stepper.closing:
            change = "Call it from on_epoch_end or between steps, or set checkpoint_every"
            raise ConfigError(explain("save while a step is being applied", "saving between steps", change))
        self.settle()
        return save(self, Path(path))

    def load(self, path: str | Path) -> None:
        """Continue from the newest checkpoint under `path` that verifies, in a loop of your own over `step`.

        Raises:
            CheckpointError: there is none, or it does not belong to this run; nothing has changed then.
        """
        restore(self, Path(path))

    def close(self) -> None:
        """End a run of your own loop over `step`: settle the last step and end its records. `fit` does it itself."""
        self.settle()
        if self.adaptive is not None:
            self.adaptive.stop_watching(self)
        self.recorder.close()
