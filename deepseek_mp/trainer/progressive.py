"""`progressive`: train in FP32, then lower more and more layers, as long as the loss curve keeps to FP32's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deepseek_mp.controller.loss_scale import LossScalePolicy
from deepseek_mp.errors import ConfigError, explain, suggest
from deepseek_mp.nn import units
from deepseek_mp.nn.loss import LossFn
from deepseek_mp.precision import PrecisionPlan, Recipe
from deepseek_mp.trainer.curves import Limits
from deepseek_mp.trainer.lowering import has_product
from deepseek_mp.trainer.progressive_result import ProgressiveResult
from deepseek_mp.trainer.setup import seed_everything
from deepseek_mp.trainer.stage_probe import plan_stages
from deepseek_mp.trainer.stage_training import Setting, StageTraining, check_run_dirs, check_setting, stage_named
from deepseek_mp.trainer.stages import (
    BASELINE,
    SHARES,
    Planned,
    Shares,
    baseline_stage,
    check_stages,
)

log = logging.getLogger("deepseek_mp")


class TrainerOptions(TypedDict, total=False):
    """Options that every stage's `MixedPrecisionTrainer` gets; it describes them."""

    loss_scale_policy: str | float | LossScalePolicy
    scheduler: Callable[[Optimizer], LRScheduler] | None
    gradient_accumulation_steps: int
    max_grad_norm: float | None
    pin: Mapping[str, str | Recipe] | None
    kernels: str | None
    compile: Literal[False, True, "regional"]
    max_skipped_steps: int
    checkpoint_every: int | None
    monitor_every: int
    progress: bool | None


def progressive(
    make_model: nn.Module | Callable[[], nn.Module],
    train_loader: Iterable[Any],
    *,
    steps: int,
    precision: str | Recipe | PrecisionPlan = "auto",
    loss_fn: LossFn | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    tolerance: float = 0.05,
    gradient_factor: float = 2.0,
    stages: Shares | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    emulate: bool = False,
    device: torch.device | str | None = None,
    seed: int | None = None,
    **options: Unpack[TrainerOptions],
) -> ProgressiveResult:
    """Train in FP32, then in stages that lower more layers; stop at the last whose loss curve keeps to FP32's.

    Every stage starts from the same weights, random state and order of data, and trains as many steps. A stage
    that diverges is a verdict, not an exception; exceptions of the user's code pass, with the stage in a note.

    Args:
        make_model: a model, of which every stage trains a copy, or a function that is called once for one.
        train_loader: batches as for `fit`; iterated anew by every stage, so no generator that is used up.
        steps: optimizer steps of each stage.
        precision: what to arrive at, as for the trainer; 'auto' measures it on the first batch.
        loss_fn, emulate, device, seed: as for the trainer.
        optimizer: parameters -> Optimizer; each stage makes its own.
        tolerance: by which share of it the smoothed loss may exceed FP32's, at any step and at the end.
        gradient_factor: within which gradient norms stay of FP32's, in the median and from start to end.
        stages: shares of the layers to lower, (0.5, 1.0) if None: first the half that saves most time, or has most
            operations where nothing was measured. Or name -> plan, in this order; `precision` is not used then.
        run_dir: each stage writes its run under run_dir/NAME, the baseline's NAME is 'fp32'.
        options: of the trainer, for every stage: `TrainerOptions`.

    Raises:
        ConfigError, PlanError, FormatError: an argument does not fit; nothing was trained.
        LoaderError: the loader gives no batch, or others when it is iterated again.
    """
    setting = Setting(
        loader=train_loader,
        steps=steps,
        limits=Limits(tolerance=tolerance, gradient_factor=gradient_factor),
        optimizer=optimizer,
        options={"loss_fn": loss_fn, "emulate": emulate, "device": device, "seed": seed, **options},
        run_dir=None if run_dir is None else Path(run_dir),
    )
    check_options(options)
    check_setting(setting)
    check_stages(stages)
    with stage_named("make_model"):
        model = _made(make_model, seed)
    training = StageTraining(setting, model)
    with stage_named("choosing the layers"):
        planned = plan_stages(training, precision, SHARES if stages is None else stages)
    check_run_dirs(setting.run_dir, [BASELINE, *(stage.name for stage in planned.stages)])
    return _through(training, planned)


def check_options(options: Mapping[str, Any]) -> None:
    """`ConfigError` for an option that stages do not have."""
    known = TrainerOptions.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        hint = suggest(unknown[0], known)
        raise ConfigError(explain(f"option {unknown[0]!r}", ", ".join(known), f"Leave it out.{hint}"))


def _made(make_model: Any, seed: int | None) -> nn.Module:
    """The model that every stage starts from; `ConfigError` if there is none."""
    if isinstance(make_model, nn.Module):
        return make_model
    if not callable(make_model):
        allowed = "a torch.nn.Module, or a function without arguments that gives one"
        raise ConfigError(explain(f"make_model={make_model!r}", allowed, "Pass for example lambda: Net(width=256)"))
    seed_everything(seed)
    model = make_model()
    if not isinstance(model, nn.Module):
        raise ConfigError(explain(f"make_model that gave {model!r}", "a torch.nn.Module", "Return the model"))
    return model


def _through(training: StageTraining, planned: Planned) -> ProgressiveResult:
    """Train the baseline and the stages, until one is not good."""
    baseline, model = training.train(baseline_stage(training.model))
    results, kept, reason = [baseline], model if baseline.good else None, planned.none
    for stage in planned.stages if baseline.good else ():
        result, trained = training.train(stage, baseline.curve)
        results.append(result)
        if not result.good:
            break
        kept = trained
    last = results[-1]
    if not last.good:
        reason = f"stage {last.name!r} is not good: {last.verdict.reason}"
    elif planned.stages:
        reason = f"every stage is good, up to {last.name!r}"
    log.info("progressive: %s", reason)
    return ProgressiveResult(
        stages=tuple(results),
        model=kept,
        reason=reason,
        complete=last.good,
        tolerance=training.setting.limits.tolerance,
        layers=sum(map(has_product, units(training.model).values())),
    )
