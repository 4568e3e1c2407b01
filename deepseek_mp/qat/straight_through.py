"""Weights rounded in the forward as a deployed layer stores them, with gradients that training can use.

Both functions take rows [N, K], with a scale for each, and the formats of `ops.weight_only`, whose rounding is done
here too: a deployed layer has the very values that the forward saw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_mp.ops.weight_only import FORMATS, rounded_by, scales_of


def straight_through(rows: Tensor, format: str) -> Tensor:
    """The rows rounded, with scales from their largest magnitudes; the gradient passes as it is: nothing is clipped."""
    rounded: Tensor = _Rounded.apply(rows, format)  # type: ignore[no-untyped-call]
    return rounded


def learned_step(rows: Tensor, step: Tensor, format: str) -> Tensor:
    """The rows rounded to integers of a learned step: clamp(round(row / step), -Q, Q) * step.

    Gradients are those of LSQ (Esser et al., "Learned step size quantization", ICLR 2020, equations 3 and 5, section
    2.2): inside of the range that of the rows is passed as it is and that of the step is round(v) - v, with v = row /
    step; outside they are 0 and -Q or Q. The step's is multiplied by 1 / sqrt(K * Q), K the weights that share it.

    Args:
        rows: [N, K] in fp32.
        step: [N] in fp32, positive.
        format: 'int8', with Q = 127.
    """
    rounded: Tensor = _LearnedStep.apply(rows, step, format)  # type: ignore[no-untyped-call]
    return rounded


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, rows: Tensor, format: str) -> Tensor:
        wide = rows.float()
        scale = scales_of(wide, format)
        return (rounded_by(wide, scale, format).float() * scale[:, None]).to(rows.dtype)

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, step: Tensor, format: str) -> Tensor:
        ctx.save_for_backward(rows, step)
        ctx.format = format
        rounded = rounded_by(rows, step, format).float() * step[:, None]
        return torch.where(torch.isfinite(rows), rounded, rows)  # integers would hide a NaN from the check of the step

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (rows, step) = grads, ctx.saved_tensors
        top = FORMATS[ctx.format][1]
        ratio = rows / step[:, None]
        inside = ratio.abs() < top
        slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(-top, top))
        of_step = (grad * slope).sum(1) / (rows.shape[1] * top) ** 0.5
        return grad * inside, of_step, None
