"""The plan of a run: the one its arguments name, or the one measured on its first batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from deepseek_mp.backends import Capabilities
from deepseek_mp.errors import ConfigError, PlanError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.nn import memory_format_of
from deepseek_mp.nn.convert import prepare
from deepseek_mp.precision import PrecisionPlan, Recipe
from deepseek_mp.trainer.auto import choose_plan
from deepseek_mp.trainer.budget import trial_within_budget
from deepseek_mp.trainer.compile import compiled_run
from deepseek_mp.trainer.config import TrainerConfig
from deepseek_mp.trainer.eager_pools import EagerPools

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer


def requested_plan(model: nn.Module, config: TrainerConfig, capabilities: Capabilities) -> PrecisionPlan | None:
    """The plan that the arguments name, in the model's own memory format; None if it has to be measured.

    Raises:
        PlanError, FormatError: with 'auto', already where no plan with these pins would fit the model.
    """
    mode, pin = config.precision_mode, config.pin or {}
    if isinstance(mode, PrecisionPlan):
        return mode.with_pins(pin)
    if mode == "auto":
        _check_any(model, config, capabilities)
        return None
    return replace(PrecisionPlan.of(mode, pin), memory_format=memory_format_of(model))


def named_plan(
    model: nn.Module,
    plan: str | PrecisionPlan,
    pin: Mapping[str, str | Recipe] | None,
    config: TrainerConfig,
    capabilities: Capabilities,
) -> PrecisionPlan:
    """The plan that a run is to change to, with the run's own pins unless there are others.

    Raises:
        PlanError, FormatError: as `requested_plan`.
        ConfigError: for 'auto', which names none.
    """
    if plan == "auto":
        raise ConfigError(explain("change_plan('auto')", "a format, a recipe or a plan", "Name one"))
    # What `adapt` says goes with the mode of the constructor.
    asked = replace(config, precision_mode=plan, pin=config.pin if pin is None else pin, adapt=None)
    wanted = requested_plan(model, asked, capabilities)
    assert wanted is not None, "only 'auto' has to be measured"
    return wanted


def _check_any(model: nn.Module, config: TrainerConfig, capabilities: Capabilities) -> None:
    """The error of FP32, unless a plan in some format of the device fits (a frozen BF16 base takes BF16 only)."""
    formats = ("fp32", *(name for name in capabilities.admissible() if name != "fp32"))
    errors: list[PlanError] = []
    for name in formats:
        try:
            prepare(
                model,
                PrecisionPlan.of(name, config.pin or {}),
                emulate=config.emulate,
                kernels=config.kernels,
                capabilities=capabilities,
            )
        except PlanError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def measured_plan(trainer: MixedPrecisionTrainer, batch: Any, progress: Callable[[str, float], None]) -> PrecisionPlan:
    """The fastest plan for this batch, timed with what training will call; the trainer's cache gets the timings."""
    model, config, device = trainer.model, trainer.config, trainer.device
    moved = calls.move(calls.parse_batch(batch), device)
    run = compiled_run(model, trainer.loss_fn, config.compile)
    with EagerPools(model, config.compile).in_force():
        run = trial_within_budget(run, model, config, moved, device)
        return choose_plan(
            model,
            lambda: run(moved).loss,
            device=device,
            capabilities=trainer.capabilities,
            pins=config.pin or {},
            compiled=bool(config.compile),
            emulate=config.emulate,
            kernels=config.kernels,
            cache=trainer.costs,
            progress=progress,
        )
