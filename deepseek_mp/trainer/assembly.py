"""Puts together the stepper of a trainer: from its model, its settings and the plan in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deepseek_mp.controller.scaler import LossScaler
from deepseek_mp.monitor import PrecisionMonitor
from deepseek_mp.nn import call as calls
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.budget import with_budget
from deepseek_mp.trainer.compile import compiled_run
from deepseek_mp.trainer.compressed import with_activations
from deepseek_mp.trainer.fused_loss import with_fused_loss
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.trainer.step import Region, Stepper
from deepseek_mp.trainer.window import Window

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer


def computation(trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> Callable[[calls.Call], calls.Result]:
    """From a call to its loss: the trainer's model and loss, compiled, fused, compressed or within a budget."""
    config = trainer.config
    run = compiled_run(trainer.model, trainer.loss_fn, config.compile, config.activation_memory_budget)
    return with_budget(with_activations(with_fused_loss(run, trainer, plan), trainer), trainer, plan)


def assemble_stepper(
    trainer: MixedPrecisionTrainer,
    plan: PrecisionPlan,
    *,
    compute: Callable[[calls.Call], calls.Result],
    scaler: LossScaler,
    monitor: PrecisionMonitor,
    finished: Callable[[StepFacts, Window], None],
    before: Callable[[], None] | None = None,
) -> Stepper:
    """The machinery of a step in this plan, which the model was converted to.

    Args:
        finished: called once per settled window with its facts.
        before: called on unscaled gradients before they are checked, or None.
    """
    config = trainer.config
    return Stepper(
        trainer.model,
        compute=compute,
        loss_fn=trainer.loss_fn,
        optimizer=trainer.optimizer,
        scaler=scaler,
        region=Region(plan, trainer.device, search=True),
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
