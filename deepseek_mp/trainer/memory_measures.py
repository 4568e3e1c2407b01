"""The ways to save memory that a trainer has, each as a measure, and how a set of them is put in force."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepseek_mp.controller.memory_choice import Measure
from deepseek_mp.errors import ConfigError
from deepseek_mp.nn.parameter_kinds import parameter_kinds
from deepseek_mp.optim import SGD, AdamW, StateFormat, StoredOptimizer, set_storage
from deepseek_mp.optim.takeover import take_over, why_not
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.precision.storage import StorageFormat
from deepseek_mp.trainer.budget import check_budget
from deepseek_mp.trainer.compressed import check_activations
from deepseek_mp.trainer.config import TrainerConfig
from deepseek_mp.trainer.fused_loss import check_fused_loss, is_fused_by_default
from deepseek_mp.trainer.storage import WeightStorage

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

LEVELS = (0.75, 0.5, 0.25)
"""Shares of the bytes kept for the backward, tried one after the other."""
FUSED, STATES, STORAGE = "fused_loss=auto", "states=8bit", "storage=bf16_sr"
UNCOUNTED = "uncounted"
"""No step of compiled code is counted by the monitor: those run uncompiled, and hold what eager code holds."""
_BY_HAND = "it was set by hand"
_UNSET = {option.name: option.default for option in fields(TrainerConfig)}
"""The options where nobody has said anything."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a set of measures comes to."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the trainer's configuration, by name."""
    states: bool = False
    """Whether the optimizer's moments are kept in 8 bits."""
    storage: bool = False
    """Whether weights that are read in BF16 are stored in it, with stochastic rounding."""
    counted: bool = True


def _level(share: float) -> str:
    return f"activation_memory_budget={share:g}"


_OPTIONS: Mapping[Measure, Mapping[str, Any]] = {
    Measure(name=FUSED, exact=True, by_batch=True): {"fused_loss": "auto"},
    **{
        Measure(
            name=_level(share), exact=True, by_batch=True, after="" if before is None else _level(before)
        ): {"activation_memory_budget": share}
        for before, share in zip((None, *LEVELS), LEVELS, strict=False)
    },
    Measure(name="activations=True", exact=False, by_batch=True): {"activations": True},
}  # fmt: skip
"""Measures that are options of the trainer, with their values. Where an option is not allowed, its checks say why."""
_OPTIMIZER = (Measure(name=STATES, exact=False, by_batch=False), Measure(name=STORAGE, exact=False, by_batch=False))


def settings_of(names: Iterable[str], *, counted: bool = True) -> Settings:
    """What the measures of these names come to; names that are none are passed over."""
    taken = set(names)
    options: dict[str, Any] = {}
    for measure, values in _OPTIONS.items():  # the furthest step of a way is the last
        options |= values if measure.name in taken else {}
    return Settings(options=options, states=STATES in taken, storage=STORAGE in taken, counted=counted)


def possible(trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> tuple[list[Measure], dict[str, str]]:
    """The measures that this trainer may take, in an order to fall back on, and why it may not take the others."""
    why = {measure.name: _option_refused(trainer, values) for measure, values in _OPTIONS.items()}
    if trainer.config.fused_loss is None and is_fused_by_default(plan):
        why[FUSED] = "where it is possible, this is done anyway"
    why[STATES], why[STORAGE] = _states_refused(trainer.optimizer), _storage_refused(trainer, plan)
    *cheap, last = _OPTIONS
    order = [*cheap, *_OPTIMIZER, last]  # casting what is saved takes more time than all others together
    return [measure for measure in order if not why[measure.name]], {name: text for name, text in why.items() if text}


def _option_refused(trainer: MixedPrecisionTrainer, values: Mapping[str, Any]) -> str:
    config = trainer.config
    for name in values:
        if getattr(config, name) != _UNSET.get(name):
            return _BY_HAND
    try:
        changed = replace(config, **values)
        check_activations(changed)
        check_budget(trainer.model, changed)
        if "fused_loss" in values:  # 'auto' is never refused, but does nothing where True is
            check_fused_loss(replace(changed, fused_loss=True), trainer.loss_fn)
    except ConfigError as error:
        return str(error).split(". Allowed", maxsplit=1)[0]
    return ""


def allowed_options(trainer: MixedPrecisionTrainer, settings: Settings) -> tuple[TrainerConfig, tuple[str, str] | None]:
    """The trainer's configuration with these options; and of one that is not allowed, its name and why."""
    config, lost = trainer.config, None
    for name, value in settings.options.items():
        if why := _option_refused(trainer, {name: value}):
            lost = name, why
        else:
            config = replace(config, **{name: value})
    return config, lost


def _states_refused(optimizer: Optimizer) -> str:
    groups = optimizer.param_groups
    if isinstance(optimizer, StoredOptimizer):
        if not isinstance(optimizer, AdamW | SGD):
            return f"{type(optimizer).__name__} keeps no such moments"
        if any(group["states"] != StateFormat.FP32 for group in groups):
            return _BY_HAND
    if isinstance(optimizer, SGD | torch.optim.SGD) and not any(group["momentum"] for group in groups):
        return "the optimizer keeps no moments"
    return _not_fresh(optimizer)


def _not_fresh(optimizer: Optimizer) -> str:
    if isinstance(optimizer, StoredOptimizer):
        return "the optimizer has made steps already" if optimizer.state else ""
    why = why_not(optimizer)
    return why and f"the optimizer stays PyTorch's: {why}"


def _storage_refused(trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> str:
    if any(isinstance(callback, WeightStorage) for callback in trainer.callbacks):
        return "WeightStorage decides how weights are stored"
    if trainer.adaptive is not None:
        return "live precision may take a layer out of BF16, and such a layer needs its weight in FP32"
    if why := _not_fresh(trainer.optimizer):
        return why
    return "" if _weights(trainer, plan) else "no layer reads an FP32 weight in BF16"


def _weights(trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> list[Tensor]:
    """The weights that may be stored in BF16: of layers that read them so, but norms, biases and embeddings."""
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    return [
        parameter
        for parameter, about in parameter_kinds(trainer.model, plan).items()
        if about.kind == "weight"
        and about.read_as == "bf16"
        and parameter.dtype is torch.float32
        and id(parameter) in trained
    ]


def put_in_force(trainer: MixedPrecisionTrainer, plan: PrecisionPlan, settings: Settings) -> Callable[[], None]:
    """Set the trainer's options and its optimizer so; gives what takes it back, optimizer state dropped.

    What computes a step is made anew by the caller.
    """
    config, optimizer = trainer.config, trainer.optimizer
    undone: list[Callable[[], None]] = []
    if settings.states or settings.storage:
        undone.append(own_optimizer(optimizer, states=settings.states))
    if settings.storage:
        weights = _weights(trainer, plan)
        _store(optimizer, weights, StorageFormat.BF16_SR)
        undone.insert(0, lambda: _store(optimizer, weights, StorageFormat.FP32))
    trainer.config = replace(config, **settings.options)

    def undo() -> None:
        trainer.config = config
        for step in undone:
            step()

    return undo


def own_optimizer(optimizer: Optimizer, *, states: bool) -> Callable[[], None]:
    """Make it one of `deepseek_mp.optim` if it is none, with moments in 8 bits if asked for; gives what undoes it."""
    wanted = StateFormat.EIGHT_BIT if states else StateFormat.FP32
    if not isinstance(optimizer, StoredOptimizer):
        return take_over(optimizer, states=wanted.value)
    before = [group["states"] for group in optimizer.param_groups]
    if states:
        _set_states(optimizer, [wanted.value] * len(before))

    def undo() -> None:
        optimizer.state.clear()
        _set_states(optimizer, before)

    return undo


def _set_states(optimizer: Optimizer, states: Sequence[str]) -> None:
    for group, value in zip(optimizer.param_groups, states, strict=True):
        group["states"] = value


def _store(optimizer: Optimizer, weights: Iterable[Tensor], format: StorageFormat) -> None:
    for weight in weights:
        set_storage(optimizer, weight, format)
