"""AdamW with moments in 8-bit blocks in one pass: what a kernel is given, and which devices have one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from deepseek_mp.backends import capabilities
from deepseek_mp.ops.block_states import Blocks


@dataclass(frozen=True, kw_only=True)
class FusedStep:
    """A step of one parameter of n values, besides the parameter and its gradient.

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
    step: int | Tensor
    """t, which also decides how moments are rounded; int64 as a tensor."""
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


FusedAdamW = Callable[[Tensor, Tensor, FusedStep], None]
"""Steps a parameter on its gradient, in place."""


@cache
def fused_adamw(device: torch.device) -> FusedAdamW | None:
    """The kernel for a device; None where there is none, and plain PyTorch does the step."""
    if capabilities(device).backend not in ("cuda", "rocm") or find_spec("triton") is None:
        return None
    run: FusedAdamW = import_module("deepseek_mp.ops.triton.adamw").adamw_in_blocks
    return run
