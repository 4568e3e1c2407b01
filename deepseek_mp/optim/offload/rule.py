"""AdamW's step on some parameters of one group: PyTorch's own, so that its numbers are PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

OPTIONS = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
    "fused": True, "decoupled_weight_decay": True,
}  # fmt: skip
"""Options of a group that `torch.optim.AdamW` has besides, so that it loads our states."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def new_state(moments: Sequence[Tensor]) -> dict[str, Tensor]:
    """The state of a parameter before its first step, as that of a fused AdamW; the moments are zeroed.

    The counter is on the host for any device: the kernels that are taken there would wait for the device to read it.
    """
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    return state | {name: moment.zero_() for name, moment in zip(MOMENTS, moments, strict=True)}


def moments_of(state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """In the order of `MOMENTS`."""
    return tuple(state[name] for name in MOMENTS)


def options(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a step of each group takes from it, now: schedules change it later."""
    return [
        {"lr": float(group["lr"]), "betas": group["betas"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
        for group in groups
    ]


def step(
    group: Mapping[str, Any],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    counters: Sequence[Tensor],
) -> None:
    """One step in place, fp32; on a CPU the fused kernel, which reads and writes every number once.

    Args:
        group: its options.
        weights, grads: fp32.
        moments: of each weight, in the order of `MOMENTS`.
        counters: fp32 [] on the host, of each weight: which step this is, 1 the first. They are read only.
    """
    firsts, seconds = ([both[number] for both in moments] for number in range(len(MOMENTS)))
    beta1, beta2 = group["betas"]
    options = {"beta1": beta1, "beta2": beta2, "lr": float(group["lr"]), "eps": group["eps"]}
    options |= {"weight_decay": group["weight_decay"], "amsgrad": False, "maximize": False}
    if weights[0].device.type == "cpu":  # as `adamw` calls it, which takes longer to do so than to step a small block
        torch._fused_adamw_(list(weights), list(grads), firsts, seconds, [], list(counters), **options)
    else:  # which counts itself
        before = list(torch._foreach_sub(list(counters), 1))
        adamw(list(weights), list(grads), firsts, seconds, [], before, foreach=True, **options)
