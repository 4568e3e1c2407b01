"""Convolutions with FP8 operands, emulated: values that FP8 can hold, multiplied in BF16.

PyTorch has no FP8 convolution that trains. What FP8 would do to a model's accuracy can be studied all the
same: input, weight and output gradient are rounded to FP8 with a scale per tensor and back, and the
ordinary convolution multiplies the rounded values, in the forward and in both products of the backward. It
is slower than BF16, and every decision says `emulated`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from deepseek_mp.nn.functional import Cast, Products
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.reference.quantise import scales_of
from deepseek_mp.ops.reference.stochastic import round_stochastically
from deepseek_mp.precision import FORMATS, Recipe, ScaleRule
from deepseek_mp.precision.scaling import TENSOR

EMULATED_CONVOLUTIONS: frozenset[type[nn.Module]] = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d})


def can_be_emulated(recipe: Recipe, kind: type[nn.Module]) -> bool:
    """Whether a convolution of this class can be emulated in the recipe: scales of whole tensors, of their own."""
    sides = recipe.sides()
    return kind in EMULATED_CONVOLUTIONS and all(
        side.granularity == TENSOR and side.rule is ScaleRule.CURRENT for side in sides
    )


def emulated_convolution(
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    products: Products,
) -> Tensor:
    """`convolve(x, weight, bias)` with x, weight and the gradient of the result rounded to the recipe's formats."""
    assert products.fprop is not None
    assert products.dgrad is not None
    rounded_x: Tensor = _Values.apply(x, products.fprop.left)  # type: ignore[no-untyped-call]
    rounded_weight: Tensor = _Values.apply(weight, products.fprop.right)  # type: ignore[no-untyped-call]
    y: Tensor = _Gradient.apply(convolve(rounded_x, rounded_weight, bias), products.dgrad.left)  # type: ignore[no-untyped-call]
    return y


@torch.no_grad()
def rounded(x: Tensor, cast: Cast) -> Tensor:
    """x, of any shape, rounded to values that FP8 times one scale can hold; infinities and NaN become NaN."""
    if not x.numel():
        return x
    target, wide = FORMATS[cast.format], x.float()
    size = wide.abs()
    finite = size < float("inf")
    scale, inverse = scales_of(torch.where(finite, size, 0.0).amax(), target, power_of_two=cast.power_of_two)
    scaled = (wide * inverse).clamp(-target.max, target.max)
    if cast.stochastic:
        scaled = round_stochastically(scaled, target, torch.rand_like(scaled))
    values = scaled.to(torch_dtype(cast.format)).float() * scale
    return torch.where(finite, values, float("nan")).to(x.dtype)


class _Values(Function):
    """Rounds in the forward; gradients pass."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, cast: Cast) -> Tensor:
        return rounded(x, cast)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gradient(Function):
    """Passes values; rounds in the backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, cast: Cast) -> Tensor:
        ctx.cast = cast
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return rounded(gradient, ctx.cast), None
