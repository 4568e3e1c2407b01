"""The trainer's settings, checked once at construction."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal

import torch

from deepseek_mp.activations import ActivationSettings
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.errors import ConfigError, explain, suggest
from deepseek_mp.nn.checks import check_kernels
from deepseek_mp.precision import RECIPES, PrecisionPlan, Recipe

MODES = ("auto", *(name for name in RECIPES if name != "fp64"))
"""FP64 is for single layers; everything else that has a name can be the base of a run."""
Compile = Literal[False, True, "regional"]
FusedLossOption = Literal[False, True, "auto"] | None
MemoryOption = float | Literal["auto"] | None


def _refuse(name: str, value: object, allowed: str, change: str | None = None) -> ConfigError:
    return ConfigError(explain(f"{name}={value!r}", allowed, change or f"Change {name}"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_seed(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 2**64


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a `MixedPrecisionTrainer` that are plain values; see its docstring for each."""

    precision_mode: str | PrecisionPlan = "auto"
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    pin: Mapping[str, str | Recipe] | None = None
    emulate: bool = False
    adapt: bool | AdaptiveSettings | None = None
    kernels: str | None = None
    compile: Compile = False
    fused_loss: FusedLossOption = None
    activations: bool | ActivationSettings = False
    activation_memory_budget: float | None = None
    memory: MemoryOption = None
    seed: int | None = None
    max_skipped_steps: int = 25
    checkpoint_every: int | None = None
    monitor_every: int = 500
    statistics_every: int | None = 50

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> TrainerConfig:
        """Of the trainer's arguments, by their names; there are others among them."""
        return cls(**{setting.name: arguments[setting.name] for setting in fields(cls)})

    def __post_init__(self) -> None:
        self._check_mode()
        self._check_adapt()
        check_kernels(self.kernels)
        if not _is_count(self.gradient_accumulation_steps):
            raise _refuse("gradient_accumulation_steps", self.gradient_accumulation_steps, "a whole number from 1")
        if self.max_grad_norm is not None and not _is_positive(self.max_grad_norm):
            raise _refuse("max_grad_norm", self.max_grad_norm, "None or a finite number above 0")
        if self.ema_decay is not None and not (_is_positive(self.ema_decay) and self.ema_decay < 1):
            raise _refuse("ema_decay", self.ema_decay, "None or a number between 0 and 1")
        if self.pin is not None and not isinstance(self.pin, Mapping):
            raise _refuse("pin", self.pin, "a mapping of name patterns to recipes, {'*.norm*': 'fp32'}")
        if not (isinstance(self.compile, bool) or self.compile == "regional"):
            raise _refuse("compile", self.compile, "False, True, 'regional'")
        if not (self.fused_loss is None or isinstance(self.fused_loss, bool) or self.fused_loss == "auto"):
            raise _refuse("fused_loss", self.fused_loss, "None, False, True, 'auto'")
        if not isinstance(self.activations, bool | ActivationSettings):
            raise _refuse("activations", self.activations, "False, True, ActivationSettings")
        self._check_budget()
        if not (self.memory is None or _is_positive(self.memory) or self.memory == "auto"):
            raise _refuse("memory", self.memory, "None, 'auto' or a number of GiB above 0")
        if self.seed is not None and not _is_seed(self.seed):
            raise _refuse("seed", self.seed, "None or a whole number from 0 and below 2**64")
        for name in ("max_skipped_steps", "monitor_every"):
            if not _is_count(getattr(self, name)):
                raise _refuse(name, getattr(self, name), "a whole number from 1")
        for name in ("checkpoint_every", "statistics_every"):
            if getattr(self, name) is not None and not _is_count(getattr(self, name)):
                raise _refuse(name, getattr(self, name), "None or a whole number of steps from 1")

    def _check_mode(self) -> None:
        mode = self.precision_mode
        if isinstance(mode, PrecisionPlan | Recipe) or mode in MODES:
            return
        hint = suggest(mode, MODES) if isinstance(mode, str) else ""
        allowed = f"{', '.join(map(repr, MODES))}, a Recipe or a PrecisionPlan"
        raise _refuse("precision_mode", mode, allowed, f"Use one of these.{hint}")

    def _check_budget(self) -> None:
        budget = self.activation_memory_budget
        if budget is not None and not (_is_positive(budget) and budget <= 1):
            raise _refuse("activation_memory_budget", budget, "None or a number above 0 and up to 1")

    def _check_adapt(self) -> None:
        if self.adapt is not None and not isinstance(self.adapt, bool | AdaptiveSettings):
            raise _refuse("adapt", self.adapt, "None, True, False or AdaptiveSettings")
        if self.adapt and self.precision_mode != "auto":
            allowed = "adapt with precision_mode='auto'; a precision that you name is kept"
            change = "Use 'auto', or callbacks=[AdaptivePrecision()] to have layers lowered beside it"
            raise _refuse("adapt", self.adapt, allowed, change)


def check_extent(epochs: object, max_steps: object) -> None:
    """`ConfigError` unless a fit knows how far to go: whole numbers, of which only `max_steps` may be None."""
    for name, value in (("epochs", epochs), ("max_steps", max_steps)):
        if (value is None and name == "max_steps") or _is_count(value) or (value == 0 and type(value) is int):
            continue
        raise _refuse(name, value, "a whole number from 0")


def check_single_process(environment: Mapping[str, str] | None = None) -> None:
    """`ConfigError` when this is one of several processes of a distributed run."""
    env: Mapping[str, Any] = os.environ if environment is None else environment
    size = env.get("WORLD_SIZE", "1")
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if group and torch.distributed.get_world_size() > 1:
        size = str(torch.distributed.get_world_size())
    if size.isdigit() and int(size) > 1:
        raise ConfigError(
            explain(
                f"a run of more than one process (WORLD_SIZE={size})",
                "one process on one device",
                "Start the script without torchrun; distributed training is not part of this release",
            )
        )
