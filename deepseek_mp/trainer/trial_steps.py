"""Steps that are tried: whole ones, as training would make them, that nobody counts and that leave nothing behind."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepseek_mp.backends import Fp32Mode, out_of_memory_count
from deepseek_mp.controller.loss_scale import make_policy
from deepseek_mp.costs.restore import release_memory
from deepseek_mp.costs.timing import is_out_of_memory
from deepseek_mp.errors import ConfigError, MixedPrecisionError, explain
from deepseek_mp.monitor import Limits, PrecisionMonitor, Sampling
from deepseek_mp.nn import apply, fp32_arithmetic, memory_format_of, revert, unconverted
from deepseek_mp.nn import call as calls
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.assembly import Run, assemble_stepper, computation_anew
from deepseek_mp.trainer.batch_part import first_samples
from deepseek_mp.trainer.kept_state import kept_state
from deepseek_mp.trainer.offloaded import updates_are_seen
from deepseek_mp.trainer.region import Region
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.trainer.setup import make_scaler
from deepseek_mp.trainer.step import Stepper
from deepseek_mp.trainer.window import Window

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

log = logging.getLogger("deepseek_mp")
progress = logging.getLogger("deepseek_mp.trials")
"""Tells each trial at INFO, as it ends: all of them may take minutes."""

FAILURES = (RuntimeError, SystemError, ValueError, MixedPrecisionError)
"""What a step may fail with that cannot be made in the way that is tried."""
SILENT = Limits(
    mass=None, gradient_mass=None, lean=None, underflow=None, gradient_underflow=None, overflow=None, by_row=None,
    kurtosis=None, spike=None, rms=None, edq=None, non_finite=False,
)  # fmt: skip
"""A trial raises no alarm: its batch may be made up, and its learning rate is zero."""
WARM_UP = 8
"""Steps at most until one is applied: the optimizer then has its state."""


class TrialSteps:
    """Makes training steps beside those of the trainer, with its model and optimizer.

    They are the first steps of a training, and hold what those hold: what is counted and measured in them too.

    Args:
        plan: which the model was converted to.
        compute: from a call to its loss.
    """

    def __init__(
        self,
        trainer: MixedPrecisionTrainer,
        plan: PrecisionPlan,
        compute: Run,
        *,
        counted: bool = True,
    ) -> None:
        self._trainer, self._plan, self._counted = trainer, plan, counted
        self._micro_batches = min(2, trainer.config.gradient_accumulation_steps)
        self._status = ""
        if trainer.has_stepper:
            self._scaler = deepcopy(trainer.scaler)
        else:
            self._scaler = make_scaler(make_policy("dynamic"), plan, trainer.capabilities, trainer.device)
        self._stepper, self._monitor = self._assembled(compute)

    @property
    def compute(self) -> Run:
        """What computes a step; by now it may have decided by the batch how."""
        return self._stepper.compute

    def begin_anew(self, *, rough: bool = False) -> None:
        """The next step is a first one again, which decides by its batch; the optimizer keeps its state.

        Not where the trainer has made steps itself: its next ones go by what those decided.

        Args:
            rough: libraries need not time their algorithms.
        """
        compute = self._stepper.compute
        self.close()
        if not (self._trainer.has_stepper and compute is self._trainer.stepper.compute):
            compute = computation_anew(self._trainer, self._plan, compute)
        self._stepper, self._monitor = self._assembled(compute, region=self._untimed() if rough else None)

    def _untimed(self) -> Region | None:
        """Arithmetic whose algorithms are not timed; None where a training would go on with what they were.

        PyTorch keeps what cuDNN took for a shape, timed or not, but with TF32 allowed apart from without, also for
        products in BF16 and FP16, of which that says nothing else. So here it is the other one of the two.
        """
        other: Fp32Mode = "ieee" if fp32_arithmetic(self._plan) == "tf32" else "tf32"
        if "tf32" not in self._trainer.capabilities.matmul_formats:
            return None
        return Region(self._plan, self._trainer.device, search=False, fp32=other)

    def _assembled(self, compute: Run, *, region: Region | None = None) -> tuple[Stepper, PrecisionMonitor]:
        trainer, every = self._trainer, self._trainer.config.statistics_every
        monitor = PrecisionMonitor(
            trainer.model,
            trainer.optimizer if updates_are_seen(trainer.optimizer) else None,
            sample_every=None,
            sampling=None if every is None else Sampling(every=every),
            limits=SILENT,
        )
        stepper = assemble_stepper(
            trainer,
            self._plan,
            compute=compute,
            scaler=self._scaler,
            monitor=monitor,
            finished=self._finished,
            region=region,
        )
        stepper.counts = self._counted
        return stepper, monitor

    def _finished(self, facts: StepFacts, _window: Window) -> None:
        self._status = facts.status

    def step(self, batch: Any, *, settle: bool = True) -> None:
        """One window; of more micro-batches than two the others are like the second.

        Without `settle` its batch is held until the next is about to be applied, as in a training.
        """
        for number in range(1, self._micro_batches + 1):
            self._stepper.run(batch, close=number == self._micro_batches)
        if settle:
            self._stepper.settle()

    def warm_up(self, step: Callable[[], bool]) -> bool:
        """Make steps until one is applied, so that the optimizer has its state; False as soon as one does."""
        for _ in range(WARM_UP):
            if not step():
                return False
            if self._status == "applied":
                return True
        log.warning("no step that was tried was applied, so memory for the optimizer's state may be missing")
        return True

    def close(self) -> None:
        self._stepper.abandon()
        self._monitor.close()


def goes_through(call: Callable[[], object], device: torch.device) -> bool:
    """Whether memory suffices for the call; any other error propagates, also one that PyTorch's backward has lost."""
    before = out_of_memory_count(device)
    try:
        call()
    except Exception as error:
        lost = isinstance(error, SystemError) and before is not None and out_of_memory_count(device) == before
        if lost or not is_out_of_memory(error):
            raise
        progress.info("memory ran out: %s: %s", type(error).__name__, str(error).strip().partition("\n")[0])
    else:
        return True
    gc.collect()  # a model may leave cycles, and in them activations
    release_memory(device)
    return False


def on_what_fits(call: Callable[[Any], PrecisionPlan], batch: Any, device: torch.device) -> PrecisionPlan:
    """What the call gives for the batch, or for the largest part of it, by halves, that memory suffices for."""
    found: list[PrecisionPlan] = []
    size = calls.batch_size(calls.parse_batch(batch))
    while size > 1:
        part = first_samples(batch, size)
        if goes_through(partial(_append, found, call, part), device):
            return found[0]
        size //= 2
    return call(first_samples(batch, size))


def _append(found: list[PrecisionPlan], call: Callable[[Any], PrecisionPlan], batch: Any) -> None:
    found.append(call(batch))


@contextmanager
def unrecorded(trainer: MixedPrecisionTrainer) -> Iterator[list[Any]]:
    """Inside, what is decided is no decision of the run, but in the list that this gives."""
    heard = _Heard()
    recorder: Any = trainer.recorder
    this: Any = trainer
    this.recorder = heard
    try:
        yield heard.decisions
    finally:
        this.recorder = recorder


class _Heard:
    """In the place of the recorder."""

    def __init__(self) -> None:
        self.decisions: list[Any] = []

    def decided(self, decisions: Sequence[Any]) -> None:
        self.decisions += decisions


@contextmanager
def trials(trainer: MixedPrecisionTrainer, what: str) -> Iterator[PrecisionPlan]:
    """Inside, steps can be tried, in the plan that this gives; afterwards the trainer is as it was.

    Learning rates are zero: trials on made-up batches must not drive the weights out of range.

    Args:
        what: tries them, in words.

    Raises:
        ConfigError: within an accumulation window.
    """
    if trainer.has_stepper and (trainer.stepper.closing or trainer.stepper.window.micro_batches):
        allowed = "it between optimizer steps"
        raise ConfigError(explain(f"{what} within an accumulation window", allowed, "Call it before the first"))
    trainer.settle()
    with trainer.monitor.paused(), kept_state(trainer), _plan_in_force(trainer) as plan:
        trainer.model.train()
        _stand_still(trainer.optimizer)
        yield plan


@contextmanager
def _plan_in_force(trainer: MixedPrecisionTrainer) -> Iterator[PrecisionPlan]:
    """The trainer's plan; for the time being that of the device's recommended format where it is not known yet."""
    if trainer.has_stepper:
        yield trainer.plan
        return
    model, config = trainer.model, trainer.config
    plan = PrecisionPlan.of(trainer.capabilities.recommended.compute, config.pin or {})
    plan = replace(plan, memory_format=memory_format_of(model))
    with unconverted(model):
        try:
            yield apply(model, plan, emulate=config.emulate, kernels=config.kernels, capabilities=trainer.capabilities)
        finally:
            revert(model)


def _stand_still(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if isinstance(rate, Tensor):
            rate.zero_()
        elif rate is not None:
            group["lr"] = 0.0
