"""AdamW for parameters in FP32 and in BF16: PyTorch's rule, in FP32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.block_states import SIGNED, UNSIGNED
from deepseek_mp.ops.fused_steps import AdamWStep, ManyAdamW, adamw_of_many, fused_adamw
from deepseek_mp.optim.fused import FusedBatch, KernelRule, Numbers
from deepseek_mp.optim.kernels import KernelOptimizer
from deepseek_mp.optim.rate import check_rate, rate_of
from deepseek_mp.optim.states import Moments
from deepseek_mp.optim.stored import Batch


class AdamW(KernelOptimizer):
    """Decoupled weight decay ("Decoupled weight decay regularization", arXiv 1711.05101), as `torch.optim.AdamW`.

    FP32 parameters get the numbers of PyTorch's `foreach` implementation; but for the last bit where a GPU has others
    with moments in blocks in the same group. Moments are FP32 for BF16 parameters too, or
    8-bit blocks.

    Args:
        params: parameters or groups.
        lr: a number, or a tensor [].
        betas: of both moments.
        eps: added to the root of the second moment.
        weight_decay: times the rate, taken off the weight.
        storage: how parameters that are BF16 tensors are written: 'bf16_kahan' or 'bf16_sr'. FP32 ones are converted
            by `set_storage`.
        states: how moments are kept: 'fp32', or '8bit' in blocks of 256 values with one scale. Parameters of one
            dimension or of fewer than 4096 values, and those in FP64, keep FP32 moments in any case.
        seed: of stochastic rounding.
        foreach: False updates one parameter after another, with the same numbers and the least memory.

    Raises:
        ConfigError: an argument out of its range, or a parameter of another dtype than FP32, FP64 and BF16.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        storage: str = "bf16_kahan",
        states: str = "fp32",
        seed: int = 0,
        foreach: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        kept = {"storage": storage, "states": states, "seed": seed, "foreach": foreach}
        super().__init__(params, defaults | kept)

    def _check_options(self, group: Mapping[str, Any]) -> None:
        check_options(**{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})

    def _moments(self, _group: Mapping[str, Any]) -> Moments:
        return {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}

    def _kernel_rule(self, group: Mapping[str, Any]) -> KernelRule:
        return KernelRule(
            alone=fused_adamw, together=adamw_of_many, make=ManyAdamW, moments=("exp_avg", "exp_avg_sq"),
            options={"betas": group["betas"], "eps": group["eps"]}, numbers_of=partial(_numbers, group),
            steps_of=partial(_fused_steps, group),
        )  # fmt: skip

    def _update(self, group: Mapping[str, Any], batch: Batch) -> None:
        lr, counts = _advance(group, batch)
        if counts is None:
            _on_device(group, batch, lr)
        else:
            _on_host(group, batch, lr, counts)


def _fused_steps(group: Mapping[str, Any], about: FusedBatch) -> Iterator[AdamWStep]:
    """The next step of each parameter, counted."""
    for parameter, numbers in about.of_each(_numbers(group, about)):
        yield AdamWStep(
            first=about.blocks(parameter, "exp_avg"), second=about.blocks(parameter, "exp_avg_sq"),
            betas=group["betas"], eps=group["eps"], **numbers, **about.stored(parameter),
        )  # fmt: skip


def _numbers(group: Mapping[str, Any], about: FusedBatch) -> Numbers:
    """Those of the next step, which is counted."""
    lr, counts = _advance(group, about.batch)
    beta1, beta2 = group["betas"]
    if counts is None:
        number, known = about.counts()
        size, root = (lr / (1 - beta1**known)).float(), (1 - beta2**known).sqrt()
        return {"decay": about.on_device(1 - lr * group["weight_decay"]), "size": size, "root": root, "step": number}
    steps = [int(count) for count in counts]
    return {
        "decay": [1 - lr * group["weight_decay"]] * len(steps),
        "size": [lr / (1 - beta1**count) for count in steps],
        "root": [(1 - beta2**count) ** 0.5 for count in steps],
        "step": steps,
    }


def _advance(group: Mapping[str, Any], batch: Batch) -> tuple[Any, list[float] | None]:
    """Count a step. Gives its rate, and its number for each parameter: None where one of them is the device's alone."""
    lr, counts = rate_of(group), batch.advance()
    return lr, None if isinstance(lr, Tensor) else counts


def _moments(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    return [state["exp_avg"] for state in batch.states], [state["exp_avg_sq"] for state in batch.states]


def _on_host(group: Mapping[str, Any], batch: Batch, lr: float, counts: Sequence[float]) -> None:
    """The operations of PyTorch's implementation in its order, so that rounding agrees."""
    beta1, beta2 = group["betas"]
    first, second = _moments(batch)
    if group["weight_decay"]:
        torch._foreach_mul_(batch.values, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(first, batch.grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, batch.grads, batch.grads, 1 - beta2)
    below = list(torch._foreach_sqrt(second))
    torch._foreach_div_(below, [(1 - beta2**count) ** 0.5 for count in counts])
    torch._foreach_add_(below, group["eps"])
    torch._foreach_addcdiv_(batch.values, first, below, [-(lr / (1 - beta1**count)) for count in counts])


def _on_device(group: Mapping[str, Any], batch: Batch, lr: float | Tensor) -> None:
    """The same with factors that are tensors; all of them are neutral where the step is skipped."""
    beta1, beta2 = group["betas"]
    first, second = _moments(batch)
    # A step that is skipped may be the first one, whose correction is 1 - beta**0.
    # What depends on it is computed for all parameters at once: the host launches each operation.
    steps = batch.counts().clamp_min(1.0)
    if group["weight_decay"]:
        torch._foreach_mul_(batch.values, batch.factor(1 - lr * group["weight_decay"]))
    torch._foreach_mul_(first, batch.factor(beta1))
    torch._foreach_add_(first, batch.grads, alpha=1 - beta1)
    torch._foreach_mul_(second, batch.factor(beta2))
    torch._foreach_addcmul_(second, batch.grads, batch.grads, 1 - beta2)
    below = list(torch._foreach_sqrt(second))
    torch._foreach_div_(below, (1 - beta2**steps).sqrt().unbind())
    torch._foreach_add_(below, group["eps"])
    updates = torch._foreach_div(first, below)
    torch._foreach_mul_(updates, batch.amount(-lr / (1 - beta1**steps)).unbind())
    torch._foreach_add_(batch.values, updates)


def check_options(*, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """`ConfigError` for an option of AdamW that is out of its range."""
    check_rate(lr)
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ConfigError(explain(f"{name}={value!r}", "a number from 0", "Pass a positive number"))
    if not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(explain(f"betas={betas!r}", "two numbers from 0 to below 1", "Pass for example (0.9, 0.999)"))
