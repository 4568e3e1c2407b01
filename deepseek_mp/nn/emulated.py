"""Layers whose operands are rounded to a recipe's values and then multiplied as usual: any recipe, emulated.

What a recipe does to a model's accuracy can be studied where nothing multiplies in it. Each of the three products
reads operands of its own, rounded along its own sum (`ops.rounding`):

    fprop   Y  = X @ W.T      rounds  X    [M, K]   and   W   [N, K]
    dgrad   dX = dY @ W       rounds  dY   [M, N]   and   W.T [K, N]
    wgrad   dW = dY.T @ X     rounds  dY.T [N, M]   and   X.T [K, M]

Groups at the edges may be short, so layers of all sizes fit. Products are FP32 (on a GPU TF32, if a flag of the
process says so). Where BF16 holds the values of both operands, CUDA multiplies those, which is exact too and fast. Sums
are FP32. As in `nn.functional`, Y is BF16, dX is rounded to BF16 before it gets the type of X, and dW and db have the
type of their parameter. X and W are kept for the backward as they are, and rounded there.

**A convolution** is a linear layer over its unfolded windows, channels innermost (`nn.windows`): groups of 16 lie
along the channels in fprop and dgrad, and along the pixels of the output in wgrad. The unfolded input takes as many
times the memory of the input as the kernel has positions, during a product. Where no operand has finer scales than one
for the tensor, nothing is unfolded: the ordinary convolution multiplies, in BF16 if that holds the values.

It is slower than BF16, and every decision says `emulated`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn import grad

from deepseek_mp.errors import ShapeError, explain
from deepseek_mp.nn.conv1x1 import Convolution, in_layout_of
from deepseek_mp.nn.functional import has_products
from deepseek_mp.nn.windows import Windows, as_rows, padded, windows_of
from deepseek_mp.ops.rounding import can_round, factored, fits_bf16
from deepseek_mp.precision import Recipe, ScaleRule
from deepseek_mp.precision.recipe import OperandRecipe, RoleRecipe
from deepseek_mp.precision.scaling import TENSOR

EMULATED_CONVOLUTIONS: frozenset[type[nn.Module]] = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d})
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FOR_INPUT: dict[int, Callable[..., Tensor]] = {1: grad.conv1d_input, 2: grad.conv2d_input, 3: grad.conv3d_input}
_FOR_WEIGHT: dict[int, Callable[..., Tensor]] = {1: grad.conv1d_weight, 2: grad.conv2d_weight, 3: grad.conv3d_weight}


def can_be_rounded(recipe: Recipe) -> bool:
    """Whether operands can be rounded to the recipe at all; delayed scales would need a past, which is not kept."""
    return all(can_round(side) and side.rule != ScaleRule.DELAYED for side in recipe.sides())


def can_be_emulated(recipe: Recipe, kind: type[nn.Module], *, groups: int = 1) -> bool:
    """Whether a layer of this class, a convolution of so many groups, can be emulated in the recipe.

    In recipes that layers multiply in, linear layers and their like are multiplied and not rounded, also where that is
    emulated; of those, other convolutions can have scales of whole tensors.
    """
    if not can_be_rounded(recipe):
        return False
    if kind is nn.Linear:
        return not has_products(recipe)
    whole = all(map(_is_whole, recipe.sides()))
    return kind in EMULATED_CONVOLUTIONS and (whole or (groups == 1 and not has_products(recipe)))


def how_it_is_multiplied(recipe: Recipe, kind: type[nn.Module]) -> str:
    """What a decision says of a layer that is emulated."""
    convolves = kind is not nn.Linear and all(map(_is_whole, recipe.sides()))
    in_bf16 = convolves and all(map(fits_bf16, recipe.sides()))
    return f"rounded to {recipe.name} and multiplied in {'BF16' if in_bf16 else 'FP32'}, to study accuracy"


def emulated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """`torch.nn.functional.linear` with the operands of its three products rounded to the recipe.

    Args:
        x: [..., K] in fp32, bf16 or fp16, with any number of rows, also none.
        weight: [N, K] of any sizes.
        bias: [N] or None.
        recipe: one that `can_be_rounded`.

    Returns:
        [..., N] in bf16. Gradients have the types of x, weight and bias, and cannot be differentiated again.
    """
    if not x.is_floating_point() or not x.dim() or x.shape[-1] != weight.shape[1]:
        passed = f"an input {list(x.shape)} of {x.dtype} for a weight {list(weight.shape)} in {recipe.name}"
        raise ShapeError(explain(passed, f"floating-point inputs [..., {weight.shape[1]}]", "Pass such an input"))
    y: Tensor = _Rows.apply(x, weight, bias, recipe, None)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])


def emulated_convolution(x: Tensor, module: Convolution, recipe: Recipe) -> Tensor:
    """The convolution's forward, of [N, C, ...] or [C, ...], with the operands of its products rounded to the recipe.

    Returns:
        What the convolution returns, in bf16. Gradients have the types of x, weight and bias, and cannot be
        differentiated again.
    """
    weight, bias = module.weight, module.bias
    batched = x if x.dim() == weight.dim() else x.unsqueeze(0)
    whole = padded(batched, module)
    windows = windows_of(module)
    if all(map(_is_whole, recipe.sides())):
        y: Tensor = _Convolution.apply(whole, weight, bias, recipe, windows, module.groups)  # type: ignore[no-untyped-call]
    else:
        rows: Tensor = _Rows.apply(whole, weight, bias, recipe, windows)  # type: ignore[no-untyped-call]
        sizes = windows.count(whole.shape[2:])
        y = in_layout_of(rows.view(len(batched), *sizes, -1).movedim(-1, 1), batched, weight)
    return y if x.dim() == weight.dim() else y.squeeze(0)


def _is_whole(side: OperandRecipe) -> bool:
    return not side.is_scaled or side.granularity == TENSOR


class _Rows(Function):
    """[..., K], or the input [N, C, ...] of a convolution with these windows, to [rows, outputs]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, windows: Windows | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.windows, ctx.bias_dtype = recipe, windows, None if bias is None else bias.dtype
        return _with_bias(_product(_rows(x, windows), as_rows(weight), recipe.fprop), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        windows: Windows | None = ctx.windows
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _product(gradient, as_rows(weight).t(), recipe.dgrad)
            dx = dx.view(x.shape) if windows is None else windows.summed_back(dx, x.shape)
            dx = dx.bfloat16().to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = _product(gradient.t(), _rows(x, windows).t(), recipe.wgrad).to(weight.dtype)
            if windows is not None:
                dw = dw.view(len(weight), *weight.shape[2:], weight.shape[1]).movedim(-1, 1)
        if ctx.needs_input_grad[2]:
            db = gradient.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None, None


def _rows(x: Tensor, windows: Windows | None) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if windows is None else windows.unfolded(x)


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y [N, outputs, ...] in bf16, plus the bias, which is rounded to bf16 as autocast does."""
    if bias is not None:
        y = y + bias.bfloat16().view(-1, *[1] * (y.dim() - 2))
    return y.bfloat16()


def _product(left: Tensor, right: Tensor, role: RoleRecipe) -> Tensor:
    """Left [A, C] times right [B, C] transposed, both rounded before: [A, B] in fp32."""
    (a, a_factor), (b, b_factor) = factored(left, role.left), factored(right, role.right)
    with torch.autocast(left.device.type, enabled=False):
        if a.is_cuda and torch.version.cuda is not None and fits_bf16(role.left) and fits_bf16(role.right):
            out = torch.mm(a.bfloat16(), b.bfloat16().t(), out_dtype=torch.float32)
        else:
            out = a @ b.t()
    return _scaled(out, a_factor, b_factor)


def _scaled(out: Tensor, *factors: Tensor | None) -> Tensor:
    for factor in factors:
        out = out if factor is None else out * factor
    return out


class _Convolution(Function):
    """The padded input [N, C, ...] to [N, outputs, ...] by PyTorch's convolutions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, windows: Windows, groups: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.bias_dtype = recipe, None if bias is None else bias.dtype
        ctx.settings = windows.stride, 0, windows.dilation, groups
        with torch.autocast(x.device.type, enabled=False):
            left, right, *factors = _pair(x, weight, recipe.fprop)
            y = _CONVOLVE[weight.dim() - 2](left, right, None, *ctx.settings)
        return _with_bias(_scaled(y.float(), *factors), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dims = weight.dim() - 2
        dx = dw = db = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                left, right, *factors = _pair(gradient, weight, recipe.dgrad)
                dx = _FOR_INPUT[dims](x.shape, right, left, *ctx.settings)
                dx = _scaled(dx.float(), *factors).bfloat16().to(x.dtype)
            if ctx.needs_input_grad[1]:
                left, right, *factors = _pair(gradient, x, recipe.wgrad)
                dw = _FOR_WEIGHT[dims](right, weight.shape, left, *ctx.settings)
                dw = _scaled(dw.float(), *factors).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            spatial = [0, *range(2, gradient.dim())]
            db = gradient.sum(spatial, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None


def _pair(left: Tensor, right: Tensor, role: RoleRecipe) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both operands rounded, in bf16 if that holds the values of both, and their factors."""
    (a, a_factor), (b, b_factor) = factored(left, role.left), factored(right, role.right)
    dtype = torch.bfloat16 if fits_bf16(role.left) and fits_bf16(role.right) else torch.float32
    return a.to(dtype), b.to(dtype), a_factor, b_factor
