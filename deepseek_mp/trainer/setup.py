"""Resolves what a user may leave out: device, optimizer, scheduler, seed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deepseek_mp import backends
from deepseek_mp.controller.scaler import check_optimizer
from deepseek_mp.errors import ConfigError, explain

DEFAULT_LEARNING_RATE = 1e-3


def choose_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device asked for; else the model's if it is an accelerator; else the best of this machine."""
    if device is not None:
        return torch.device(device)
    first = next(model.parameters(), None)
    if first is not None and first.device.type not in ("cpu", "meta"):
        return first.device
    return backends.default_device()


def make_optimizer(
    given: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None, model: nn.Module
) -> Optimizer:
    """An optimizer over the model's trainable parameters.

    Raises:
        ConfigError: it is no optimizer, needs a closure, or the model has nothing to train.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError(
            explain("a model without trainable parameters", "at least one with requires_grad", "Unfreeze a layer")
        )
    if given is None:
        optimizer: Any = _default(params)
    elif isinstance(given, Optimizer):
        optimizer = given
    elif callable(given):
        optimizer = given(params)
    else:
        optimizer = given
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            explain(
                f"optimizer={given!r}",
                "a torch.optim.Optimizer, or a function from parameters to one",
                "Pass for example lambda params: torch.optim.SGD(params, lr=0.1)",
            )
        )
    check_optimizer(optimizer)
    return optimizer


def _default(params: list[nn.Parameter]) -> Optimizer:
    """AdamW, fused where the device has the kernel: it is faster, and can skip a step by itself."""
    try:
        return torch.optim.AdamW(params, lr=DEFAULT_LEARNING_RATE, fused=True)
    except RuntimeError:  # PyTorch's way of saying that the device or dtype has no fused kernel
        return torch.optim.AdamW(params, lr=DEFAULT_LEARNING_RATE)


def make_scheduler(given: Any, optimizer: Optimizer) -> Any:
    """A scheduler of that optimizer, or None.

    Raises:
        ConfigError: it is no scheduler, or belongs to another optimizer.
    """
    if given is None:
        return None
    scheduler = given if isinstance(given, LRScheduler) or not callable(given) else given(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(
            explain(
                f"scheduler={given!r}",
                "an LRScheduler, or a function from an optimizer to one",
                "Pass for example lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1000)",
            )
        )
    if scheduler.optimizer is not optimizer:
        raise ConfigError(
            explain(
                "a scheduler of another optimizer than the one that trains",
                "a scheduler of the optimizer passed along with it",
                "Pass optimizer= too, or a function from an optimizer to a scheduler",
            )
        )
    return scheduler


def seed_everything(seed: int | None) -> None:
    """Seed the generators of Python, PyTorch and, if it is loaded, NumPy."""
    if seed is None:
        return
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
