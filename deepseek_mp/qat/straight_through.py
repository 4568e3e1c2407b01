"""Values rounded in the forward as a deployed layer has them, with gradients that training can use.

The rounding is that of `ops.weight_only`, `ops.int4_linear` and `ops.fp8_linear`: a deployed layer has the very values
that the forward saw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_mp.ops.fp8_linear import rounded_rows
from deepseek_mp.ops.int4_linear import LARGEST, MIDDLE, codes_by, grid_of, group_of
from deepseek_mp.ops.reference.int4_linear import values_of
from deepseek_mp.ops.weight_only import FORMATS, rounded_by, scales_of


def straight_through(rows: Tensor, format: str) -> Tensor:
    """Rows [N, K] in a format of `ops.weight_only`, with scales from their largest magnitudes.

    The gradient passes as it is: nothing is clipped.
    """
    with torch.no_grad():
        wide = rows.float()
        scale = scales_of(wide, format)
        rounded = rounded_by(wide, scale, format).float() * scale[:, None]
    return _straight(rows, rounded)


def straight_through_groups(rows: Tensor) -> Tensor:
    """Rows [N, K] in 4 bits, in whole groups, as `ops.int4_linear.int4_weight` rounds them; the gradient passes."""
    with torch.no_grad():
        wide = _grouped(rows.float())
        scale, zero = grid_of(wide)
        rounded = values_of(codes_by(wide, scale, zero), scale, zero)
    return _straight(rows, rounded)


def straight_through_activations(x: Tensor) -> Tensor:
    """Activations [..., K] in FP8, each row by itself, as `ops.fp8_linear` rounds them; the gradient passes.

    A row with an infinity or NaN is NaN everywhere.
    """
    return _straight(x, rounded_rows(x.detach().reshape(-1, x.shape[-1])).view(x.shape))


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
    with torch.no_grad():
        rounded = rounded_by(rows, step, format).float() * step[:, None]
        rounded = torch.where(torch.isfinite(rows), rounded, rows)  # integers hide a NaN from the check of the step
    top = FORMATS[format][1]
    return _learned(rows, step, torch.zeros_like(step), rounded, (-top, top))


def learned_group_step(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows in 4 bits with learned scales: those of `straight_through_groups` times a factor for each group.

    The zero, in the middle of the group's range, stays where it is; the scale is rounded to BF16, straight-through.
    Gradients are those of LSQ, as of `learned_step`, with v = (row - zero) / scale inside of -8 to 7, and Q = 7.

    Args:
        rows: [N, K] in fp32, in whole groups.
        factor: [N, K / group] in fp32, positive.
    """
    with torch.no_grad():
        wide = _grouped(rows)
        whole, zero = grid_of(wide)
        scale = (whole.float() * factor).to(whole.dtype)
        rounded = values_of(codes_by(wide, scale, zero), scale, zero).view_as(wide).flatten(0, 1)
    step = _straight(whole.float() * factor, scale).flatten()
    ends = (-MIDDLE, LARGEST - MIDDLE)
    return _learned(_grouped(rows).flatten(0, 1), step, zero.float().flatten(), rounded, ends).view_as(rows)


def _grouped(rows: Tensor) -> Tensor:
    """[N, K] as [N, groups, group]."""
    group = group_of(rows.shape[1])
    assert group is not None, "layers of other widths are not rounded in groups"
    return rows.view(len(rows), -1, group)


def _straight(original: Tensor, rounded: Tensor) -> Tensor:
    made: Tensor = _Straight.apply(original, rounded)  # type: ignore[no-untyped-call]
    return made


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, original: Tensor, rounded: Tensor) -> Tensor:
        return rounded.to(original.dtype, copy=True)

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def _learned(rows: Tensor, step: Tensor, zero: Tensor, rounded: Tensor, ends: tuple[float, float]) -> Tensor:
    made: Tensor = _LearnedStep.apply(rows, step, zero, rounded, ends)  # type: ignore[no-untyped-call]
    return made


class _LearnedStep(torch.autograd.Function):
    """Rows [N, K] rounded with a step and a zero for each, given as they are rounded; gradients of rows and steps."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, step: Tensor, zero: Tensor, rounded: Tensor, ends: tuple[float, float]
    ) -> Tensor:
        ctx.save_for_backward(rows, step, zero)
        ctx.ends = ends
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (rows, step, zero) = grads, ctx.saved_tensors
        low, top = ctx.ends
        ratio = (rows - zero[:, None]) / step[:, None]
        inside = (low < ratio) & (ratio < top)
        slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, top))
        of_step = (grad * slope).sum(1) / (rows.shape[1] * top) ** 0.5
        return grad * inside, of_step, None, None, None
