"""SGD with momentum for parameters in FP32 and in BF16: PyTorch's rule, in FP32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.block_states import SIGNED
from deepseek_mp.ops.fused_steps import ManyMomentum, MomentumStep, fused_sgd, sgd_of_many
from deepseek_mp.optim.fused import FusedBatch, KernelRule, Numbers
from deepseek_mp.optim.kernels import KernelOptimizer
from deepseek_mp.optim.rate import check_rate, rate_of
from deepseek_mp.optim.states import Moments
from deepseek_mp.optim.stored import Batch

MOMENTUM = "momentum_buffer"


class SGD(KernelOptimizer):
    """Gradient descent with momentum, weight decay and Nesterov's look ahead, as `torch.optim.SGD`.

    Args:
        params: parameters or groups.
        lr: a number, or a tensor [].
        momentum: share of the last direction that stays; its buffer is FP32, or 8-bit blocks.
        dampening: share of the gradient that does not enter the momentum, but in the first step.
        weight_decay: times the weight, added to the gradient.
        nesterov: needs momentum without dampening.
        storage, states, seed, foreach: as in `AdamW`.

    Raises:
        ConfigError: an argument out of its range, or a parameter of another dtype than FP32, FP64 and BF16.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        storage: str = "bf16_kahan",
        states: str = "fp32",
        seed: int = 0,
        foreach: bool = True,
    ) -> None:
        rule = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        kept = {"storage": storage, "states": states, "seed": seed, "foreach": foreach}
        super().__init__(params, {**rule, "nesterov": nesterov, **kept})

    def _check_options(self, group: Mapping[str, Any]) -> None:
        check_rate(group["lr"])
        momentum, dampening = group["momentum"], group["dampening"]
        for name in ("momentum", "weight_decay"):
            if not group[name] >= 0:
                raise ConfigError(explain(f"{name}={group[name]!r}", "a number from 0", "Pass a positive number"))
        if group["nesterov"] and (momentum <= 0 or dampening != 0):
            passed = f"nesterov=True with momentum={momentum} and dampening={dampening}"
            raise ConfigError(explain(passed, "momentum above 0 and dampening 0", "Set both, or leave nesterov out"))

    def _moments(self, group: Mapping[str, Any]) -> Moments:
        return {MOMENTUM: SIGNED} if group["momentum"] else {}

    def _kernel_rule(self, group: Mapping[str, Any]) -> KernelRule:
        return KernelRule(
            alone=fused_sgd, together=sgd_of_many, make=ManyMomentum, moments=(MOMENTUM,) if group["momentum"] else (),
            options=_options(group), numbers_of=partial(_numbers, group), steps_of=partial(_fused_steps, group),
        )  # fmt: skip

    def _update(self, group: Mapping[str, Any], batch: Batch) -> None:
        batch.advance()
        grads: Sequence[Tensor] = batch.grads
        if group["weight_decay"]:
            grads = _with_decay(batch, batch.amount(group["weight_decay"]))
        if group["momentum"]:
            grads = _with_momentum(group, batch, list(grads))
        rate = batch.amount(-rate_of(group))
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            torch._foreach_add_(batch.values, torch._foreach_mul(list(grads), rate))
        else:
            torch._foreach_add_(batch.values, list(grads), alpha=float(rate))


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("momentum", "weight_decay", "nesterov")}


def _fused_steps(group: Mapping[str, Any], about: FusedBatch) -> Iterator[MomentumStep]:
    """The next step of each parameter, counted."""
    options = _options(group)
    for parameter, numbers in about.of_each(_numbers(group, about)):
        yield MomentumStep(buffer=about.blocks(parameter, MOMENTUM), **options, **numbers, **about.stored(parameter))


def _numbers(group: Mapping[str, Any], about: FusedBatch) -> Numbers:
    """Those of the next step, which is counted."""
    rate, dampening, counts = rate_of(group), group["dampening"], about.batch.advance()
    if counts is None or isinstance(rate, Tensor):
        number, known = about.counts()
        return {"rate": about.on_device(rate), "entering": torch.where(known <= 1, 1.0, 1 - dampening), "step": number}
    entering = [1.0 if count <= 1 else 1 - dampening for count in counts]
    return {"rate": [rate] * len(counts), "entering": entering, "step": [int(count) for count in counts]}


def _with_decay(batch: Batch, decay: float | Tensor) -> Sequence[Tensor]:
    """The gradients and the decay of the weights; nothing where the step is skipped."""
    if isinstance(decay, Tensor):
        return torch._foreach_add(batch.grads, torch._foreach_mul(batch.values, decay))
    return torch._foreach_add(batch.grads, batch.values, alpha=decay)


def _with_momentum(group: Mapping[str, Any], batch: Batch, grads: list[Tensor]) -> Sequence[Tensor]:
    """Advance the buffers and give the direction to go."""
    momentum, dampening = group["momentum"], group["dampening"]
    buffers = [state[MOMENTUM] for state in batch.states]
    torch._foreach_mul_(buffers, batch.factor(momentum))
    if dampening:
        _add_damped(batch, buffers, grads, dampening)
    else:
        torch._foreach_add_(buffers, grads)
    return torch._foreach_add(grads, buffers, alpha=momentum) if group["nesterov"] else buffers


def _add_damped(batch: Batch, buffers: list[Tensor], grads: list[Tensor], dampening: float) -> None:
    """Let gradients enter the buffers by their share: all of it in the first step of a parameter."""
    steps = [state["step"] for state in batch.states]
    if steps[0].device.type != "cpu":
        shares = [torch.where(step <= 1, 1.0, 1 - dampening) for step in steps]
        torch._foreach_add_(buffers, torch._foreach_mul(grads, shares))
        return
    is_first = [step.item() <= 1 for step in steps]
    for first, share in ((True, 1.0), (False, 1 - dampening)):
        some = [index for index, of in enumerate(is_first) if of is first]
        if some:  # as PyTorch does it: a product of its own would be rounded before it is added
            torch._foreach_add_([buffers[i] for i in some], [grads[i] for i in some], alpha=share)
