"""Plans the stages of a progressive run, by what a trainer of a scratch copy says of the model's first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deepseek_mp.precision import PrecisionPlan, Recipe
from deepseek_mp.trainer.lowering import Lowered, counted_flops, lowered_layers
from deepseek_mp.trainer.stage_training import StageTraining
from deepseek_mp.trainer.stages import Planned, Shares, Stage, stages_of


def plan_stages(training: StageTraining, precision: str | Recipe | PrecisionPlan, stages: Shares) -> Planned:
    """The stages, all of whose plans fit the model and the device.

    Raises:
        PlanError, FormatError, ConfigError: a plan or an option does not fit.
        LoaderError: the loader has no batch, or another one each time.
    """
    batch = training.first_batch()
    pin = training.setting.options.get("pin")
    if isinstance(stages, Mapping):
        named = [_named(training, name, plan) for name, plan in stages.items()]
        return Planned(stages=tuple(named))
    trainer = _scratch(training, precision, pin=pin)
    if precision == "auto":
        trainer.step(batch)
        trainer.close()
    plan, model = trainer.plan, trainer.model
    lowered = lowered_layers(model, plan, {})
    if not any(layer.saved_ms is not None for layer in lowered):
        lowered = _with_flops(training, plan, batch)
    if not lowered:
        return Planned(stages=(), none=_why_none(precision, plan))
    return Planned(stages=tuple(stages_of(model, plan, lowered, stages)))


def _named(training: StageTraining, name: str, plan: str | Recipe | PrecisionPlan) -> Stage:
    """A stage of a plan that the user names."""
    trainer = _scratch(training, plan, pin=training.setting.options.get("pin"))
    lowered = lowered_layers(trainer.model, trainer.plan, {})
    return Stage(name=name, plan=trainer.plan, lowered=tuple(layer.name for layer in lowered))


def _with_flops(training: StageTraining, plan: PrecisionPlan, batch: Any) -> list[Lowered]:
    """The layers that the plan lowers, with their work on a batch, counted while a step is made on it."""
    trainer = _scratch(training, plan, pin=None, compile=False)
    with counted_flops(trainer.model) as flops:
        trainer.step(batch)
    trainer.close()
    return lowered_layers(trainer.model, trainer.plan, flops)


def _scratch(training: StageTraining, plan: Any, **changed: Any) -> Any:
    """A trainer whose steps change no weight: its optimizer has no state, and a rate of zero."""
    return training.trainer(plan, optimizer=lambda params: torch.optim.SGD(params, lr=0.0), scheduler=None, **changed)


def _why_none(precision: object, plan: PrecisionPlan) -> str:
    """Why nothing is left to lower."""
    whole = next((decision for decision in plan.decisions if decision.layer == ""), None)
    if precision == "auto":
        return f"'auto' chose {plan.base.name}{f': {whole.detail}' if whole is not None and whole.detail else ''}"
    return f"no layer that multiplies is lowered by a plan with the base {plan.base.name}"
