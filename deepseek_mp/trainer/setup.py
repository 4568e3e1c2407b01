"""Resolves what a user may leave out: device, optimizer, scheduler, seed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deepseek_mp import backends
from deepseek_mp.backends.detect import as_device
from deepseek_mp.controller.loss_scale import LossScalePolicy, NoLossScale
from deepseek_mp.controller.scaler import LossScaler, check_optimizer
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn import apply, current_plan, kernels_in_force, revert
from deepseek_mp.optim.offload.stepped import stepped
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.precision.formats import FP16
from deepseek_mp.trainer.config import check_single_process
from deepseek_mp.trainer.rng import rng_state, set_rng_state

DEFAULT_LEARNING_RATE = 1e-3


def check_arguments(model: object, loss_fn: object) -> None:
    """`ConfigError` for one of several processes, or a model or a loss function that cannot be called as one."""
    check_single_process()
    if not isinstance(model, nn.Module):
        raise ConfigError(explain(f"model={model!r}", "a torch.nn.Module", "Pass the model object"))
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            explain("a model on the meta device", "parameters with values", "Call model.to_empty and initialise it")
        )
    if loss_fn is not None and (not callable(loss_fn) or isinstance(loss_fn, type)):
        allowed = "None, or a function from (output, target) to a scalar tensor"
        raise ConfigError(explain(f"loss_fn={loss_fn!r}", allowed, "Pass a function or object, not a name or class"))


@contextmanager
def unchanged_if_refused(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever is raised inside, the model's classes and tensors and the random generators are as before."""
    plan, kernels, random_state = current_plan(model), kernels_in_force(model), rng_state(device)
    parameters = [(p, p.data) for p in model.parameters()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]  # noqa: SLF001
    try:
        yield
    except BaseException:
        for param, data in parameters:
            param.data = data
        for now, before in buffers:
            now.update(before)
        revert(model)
        if plan is not None:
            apply(model, plan, emulate=True, kernels=kernels)  # it was in force, so what it emulates was agreed to
        set_rng_state(*random_state, device)
        raise


def choose_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device asked for; else the model's if it is an accelerator; else the best of this machine.

    Raises:
        ConfigError: PyTorch does not know such a device, this machine has none, or nothing can be computed on it.
    """
    if device is not None:
        where = as_device(device)
        if where.type == "meta":
            raise ConfigError(explain("device 'meta'", "a device that computes", "Choose another, or leave it out"))
        backends.capabilities(where)  # says so where there is none, which PyTorch says in words of its own
        return where
    first = next(model.parameters(), None)
    if first is not None and first.device.type not in ("cpu", "meta"):
        return first.device
    return backends.default_device()


def make_optimizer(
    given: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None, model: nn.Module
) -> Optimizer:
    """An optimizer over the model's trainable parameters.

    Raises:
        ConfigError: it is no optimizer, needs a closure, trains another model, or there is nothing to train.
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
                f"optimizer={given!r}"
                if optimizer is given
                else f"a function for the optimizer that gave {optimizer!r}",
                "a torch.optim.Optimizer, or a function from parameters to one",
                "Pass for example lambda params: torch.optim.SGD(params, lr=0.1)",
            )
        )
    check_optimizer(optimizer)
    ours = {id(p) for p in params} | {id(stepped(optimizer, p)) for p in params}
    if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            explain(
                "an optimizer that holds none of the model's trainable parameters",
                "an optimizer over model.parameters()",
                "Build it from the very model that is passed, or pass a function from parameters to an optimizer",
            )
        )
    return optimizer


def _default(params: list[nn.Parameter]) -> Optimizer:
    """AdamW, fused where the device has the kernel: it is faster, and can skip a step by itself."""
    if not all(param.is_floating_point() for param in params):
        return torch.optim.AdamW(params, lr=DEFAULT_LEARNING_RATE)  # fused kernels take no complex parameters
    try:
        return torch.optim.AdamW(params, lr=DEFAULT_LEARNING_RATE, fused=True)
    except RuntimeError:  # PyTorch's way of saying that the device or dtype has no fused kernel
        return torch.optim.AdamW(params, lr=DEFAULT_LEARNING_RATE)


@torch.no_grad()
def align_optimizer(optimizer: Optimizer) -> None:
    """Give existing state the memory format of its parameter, which a plan may have changed.

    Fused kernels walk parameter, gradient and state in memory order.
    """
    for param, entry in optimizer.state.items():
        for key, value in entry.items():
            same_shape = isinstance(value, torch.Tensor) and value.shape == param.shape and value.dim() > 0
            if same_shape and value.stride() != param.stride():
                entry[key] = torch.empty_like(param, dtype=value.dtype).copy_(value)


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
                f"scheduler={given!r}"
                if scheduler is given
                else f"a function for the scheduler that gave {scheduler!r}",
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


def make_scaler(
    policy: LossScalePolicy, plan: PrecisionPlan | None, capabilities: backends.Capabilities, device: torch.device
) -> LossScaler:
    """The scaler of a plan: by the policy where some gradients are fp16, otherwise the scale is one.

    Where the device flushes subnormals the policy's floor rises by the binades that are lost, since
    what a scale has to keep representable is that much larger.
    """
    if plan is None or "fp16" not in plan.formats:
        return LossScaler(NoLossScale(), device=device)
    lost = capabilities.smallest_useful("fp16") / FP16.smallest_subnormal
    if lost > 1:
        policy.raise_floor(policy.floor * lost)
    return LossScaler(policy, device=device)


def seed_everything(seed: int | None) -> None:
    """Seed the generators of Python, PyTorch and, if it is loaded, NumPy."""
    if seed is None:
        return
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
