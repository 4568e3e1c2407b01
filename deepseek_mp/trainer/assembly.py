"""Puts together the stepper of a trainer: from its model, its settings and the plan in force."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from deepseek_mp.controller.scaler import LossScaler
from deepseek_mp.monitor import PrecisionMonitor
from deepseek_mp.nn import call as calls
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.budget import Budgeted, with_budget
from deepseek_mp.trainer.compile import compiled_run
from deepseek_mp.trainer.compressed import Compressed, with_activations
from deepseek_mp.trainer.eager_pools import EagerPools
from deepseek_mp.trainer.fused_loss import FusedLoss, with_fused_loss
from deepseek_mp.trainer.region import Region
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.trainer.step import Stepper
from deepseek_mp.trainer.window import Window

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

Run = Callable[[calls.Call], calls.Result]
"""From a call to its loss."""


def computation(trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> Run:
    """From a call to its loss: the trainer's model and loss, compiled, fused, compressed or within a budget."""
    config = trainer.config
    run = compiled_run(trainer.model, trainer.loss_fn, config.compile, config.activation_memory_budget)
    return _around(run, trainer, plan)


def computation_anew(trainer: MixedPrecisionTrainer, plan: PrecisionPlan, compute: Run) -> Run:
    """The same as it was before its first batch, by which it decides what it does in later steps.

    Compiled code is kept: it is compiled for every batch that it needs to be anyway.
    """
    while isinstance(compute, Budgeted | Compressed | FusedLoss):
        compute = compute.run
    return _around(compute, trainer, plan)


def _around(run: Run, trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> Run:
    fused = with_fused_loss(run, trainer, plan)
    unread = fused.unread if isinstance(fused, FusedLoss) else nullcontext
    return with_budget(with_activations(fused, trainer), trainer, plan, unread=unread)


def assemble_stepper(
    trainer: MixedPrecisionTrainer,
    plan: PrecisionPlan,
    *,
    compute: Callable[[calls.Call], calls.Result],
    scaler: LossScaler,
    monitor: PrecisionMonitor,
    finished: Callable[[StepFacts, Window], None],
    before: Callable[[], None] | None = None,
    region: Region | None = None,
) -> Stepper:
    """The machinery of a step in this plan, which the model was converted to.

    Args:
        finished: called once per settled window with its facts.
        before: called on unscaled gradients before they are checked, or None.
        region: the plan's arithmetic, where it is not that of a training.
    """
    config = trainer.config
    return Stepper(
        trainer.model,
        compute=compute,
        pools=EagerPools(trainer.model, config.compile),
        loss_fn=trainer.loss_fn,
        optimizer=trainer.optimizer,
        scaler=scaler,
        region=region or Region(plan, trainer.device, search=True),
        device=trainer.device,
        accumulation=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        max_skipped=config.max_skipped_steps,
        compiled=bool(config.compile),
        counts=not (config.compile and config.activation_memory_budget is not None),
        monitor=monitor,
        monitor_every=config.monitor_every,
        finished=finished,
        before=before,
    )
