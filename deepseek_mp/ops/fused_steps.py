"""Optimizer steps with moments in 8-bit blocks in one pass: what kernels are given, and which devices have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.backends import capabilities
from deepseek_mp.ops.block_states import Blocks
from deepseek_mp.ops.pointer_table import PointerTable


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How the new values of a parameter are written, and whether they are."""

    step: int | Tensor
    """The number t of the step, which also decides how moments are rounded; int64 [] as a tensor."""
    storage: str
    """How w is written: 'fp32', 'bf16_kahan' or 'bf16_sr'."""
    compensation: Tensor | None = None
    """bf16 [n], for 'bf16_kahan'."""
    seed: int = 0
    stream: int = 0
    """Of the random bits of `ops.stored`, for 'bf16_sr'."""
    scale: Tensor | None = None
    """fp32 of one value: divides the gradient."""
    skip: Tensor | None = None
    """fp32 of one value: where it is not 0, everything stays as it is."""


@dataclass(frozen=True, kw_only=True)
class AdamWStep(Stored):
    """A step of AdamW of one parameter of n values, besides the parameter and its gradient.

    The parameter w is fp32 or bf16, and contiguous as the gradient g is, which is of any floating type. With t the
    number of the step:

        m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2
        w <- decay w - size m / (sqrt(v) / root + eps)

    `decay`, `size`, `root` and `step` are numbers, or all of them tensors [] on the device.
    """

    first: Blocks
    second: Blocks
    betas: tuple[float, float]
    eps: float
    decay: float | Tensor
    """1 - rate * weight decay."""
    size: float | Tensor
    """rate / (1 - beta1^t)"""
    root: float | Tensor
    """sqrt(1 - beta2^t)"""


@dataclass(frozen=True, kw_only=True)
class MomentumStep(Stored):
    """A step of SGD with momentum, of a parameter as for `AdamWStep`.

        g <- g + weight_decay w,   m <- momentum m + entering g
        w <- w - rate (g + momentum m if nesterov, else m)

    `rate`, `entering` and `step` are numbers, or all of them tensors [] on the device.
    """

    buffer: Blocks
    momentum: float
    weight_decay: float
    nesterov: bool
    rate: float | Tensor
    entering: float | Tensor
    """1 in the first step, later 1 - dampening."""


@dataclass(frozen=True, kw_only=True)
class Many:
    """The step of all parameters of a table, which are stored alike; see `Stored` for what is not said here."""

    table: PointerTable
    storage: str
    gradient: torch.dtype
    """Of each of the gradients."""
    in_blocks: bool
    """Whether moments are in blocks, or fp32 in the order of `flatten()`."""
    permuted: bool
    """Whether parameters, compensations and gradients lie in channels_last."""
    step: int | Tensor
    """One for all, or int64 [n] on the device."""
    seed: int
    scale: Tensor | None
    skip: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ManyAdamW(Many):
    """As `AdamWStep`; `decay`, `size` and `root` are numbers, or tensors [], [n] and [n] on the device."""

    betas: tuple[float, float]
    eps: float
    decay: float | Tensor
    size: float | Tensor
    root: float | Tensor


@dataclass(frozen=True, kw_only=True)
class ManyMomentum(Many):
    """As `MomentumStep`; `rate` and `entering` are numbers, or tensors [] and [n] on the device."""

    momentum: float
    weight_decay: float
    nesterov: bool
    rate: float | Tensor
    entering: float | Tensor


FusedAdamW = Callable[[Tensor, Tensor, AdamWStep], None]
"""Steps a parameter on its gradient, in place."""
FusedSGD = Callable[[Tensor, Tensor, MomentumStep], None]
AdamWOfMany = Callable[[ManyAdamW], None]
"""Steps the parameters of a table, in place and bit by bit as one by one."""
SGDOfMany = Callable[[ManyMomentum], None]


def fused_adamw(device: torch.device) -> FusedAdamW | None:
    """The kernel for a device; None where there is none, and plain PyTorch does the step."""
    run: FusedAdamW | None = _kernel(device, "adamw", "adamw_in_blocks")
    return run


def fused_sgd(device: torch.device) -> FusedSGD | None:
    """As `fused_adamw`."""
    run: FusedSGD | None = _kernel(device, "sgd", "sgd_in_blocks")
    return run


def adamw_of_many(device: torch.device) -> AdamWOfMany | None:
    """The kernel for many parameters at once; None where there is none."""
    run: AdamWOfMany | None = _kernel(device, "adamw", "adamw_of_many")
    return run


def sgd_of_many(device: torch.device) -> SGDOfMany | None:
    """As `adamw_of_many`."""
    run: SGDOfMany | None = _kernel(device, "sgd", "sgd_of_many")
    return run


@cache
def _kernel(device: torch.device, rule: str, name: str) -> Any:
    if capabilities(device).backend not in ("cuda", "rocm") or find_spec("triton") is None:
        return None
    return getattr(import_module(f"deepseek_mp.ops.triton.{rule}"), name)
