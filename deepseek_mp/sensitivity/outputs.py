"""The output of a unit as it would be in a recipe, on a sample of its input: emulated in FP32.

Operands are rounded as the recipe says (`ops.rounding`), multiplied in FP32, and the result is rounded to the type
that the recipe's region hands on. A norm or an embedding has no product: in a 16-bit recipe its input, its parameters
and its output are rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.nn.unit import CONVOLUTIONS, NARROW_FORMATS, original_class
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.precision import Recipe
from deepseek_mp.precision.recipe import OperandRecipe
from deepseek_mp.precision.scaling import TENSOR

WHOLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Units that compute with the whole batch while training."""
_SEVERAL = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.Bilinear, nn.EmbeddingBag)


def can_estimate(module: nn.Module, recipe: Recipe) -> bool:
    """Whether the recipe means something for the unit: scaled ones do for products, those by parts for linear ones."""
    kind = original_class(module)
    if recipe.is_plain or kind is nn.Linear:
        return True
    return kind in CONVOLUTIONS and all(side.granularity == TENSOR for side in recipe.sides() if side.is_scaled)


def why_not_estimated(module: nn.Module) -> str | None:
    """Why nothing can be estimated for the unit, or None."""
    kind = original_class(module)
    if kind in _SEVERAL:
        return f"{kind.__name__} reads or gives several tensors, or multiplies in steps of its own"
    return None


def is_rowwise(module: nn.Module) -> bool:
    """Whether the unit computes every row of its input alone."""
    return original_class(module) in (nn.Linear, nn.LayerNorm, nn.RMSNorm)


def needs_whole_batch(module: nn.Module) -> bool:
    """Whether a part of the batch gives another output than it has in the whole."""
    return original_class(module) in WHOLE and module.training


def exact_output(module: nn.Module, x: Tensor) -> Tensor:
    """The output for `x` in FP32."""
    return _run(module, x, {name: _fp32(p) for name, p in _parameters(module).items()})


@torch.no_grad()
def output_in(module: nn.Module, x: Tensor, recipe: Recipe, largest: Tensor) -> Tensor:
    """The output for the sample `x` in the recipe; `largest` is the largest magnitude of the whole input.

    Where the format of the result cannot hold a value, it is infinite.
    """
    left, right = recipe.fprop.left, recipe.fprop.right
    if original_class(module) is nn.Linear:
        weight = _parameters(module)["weight"].float()
        return product_in(module, round_sample(x, left, largest), rounded(weight, right), recipe)
    parameters = {}
    for name, parameter in _parameters(module).items():
        wide = _fp32(parameter)
        if parameter.dim() < 2 and right.is_scaled:
            parameters[name] = wide  # a bias beside a scaled product is added in FP32
        else:
            parameters[name] = rounded(wide.flatten(1) if wide.dim() > 2 else wide, right).view(wide.shape)
    given = round_sample(x, left, largest) if x.is_floating_point() else x
    return _handed_on(_run(module, given, parameters), recipe)


@torch.no_grad()
def product_in(module: nn.Module, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """The output of a linear layer for operands that are rounded already."""
    bias = _parameters(module).get("bias")
    if bias is not None:  # beside a scaled product it is added in FP32
        bias = bias.float() if recipe.fprop.right.is_scaled else rounded(bias.float(), recipe.fprop.right)
    with torch.autocast(x.device.type, enabled=False):
        return _handed_on(F.linear(x, weight, bias), recipe)


def _handed_on(made: Tensor, recipe: Recipe) -> Tensor:
    """The output in the type that the recipe's region gives it, as FP32."""
    return made.to(torch_dtype(recipe.region)).float() if recipe.region in NARROW_FORMATS else made


def round_sample(x: Tensor, side: OperandRecipe, largest: Tensor) -> Tensor:
    """Rows or items of an operand rounded as part of the whole, whose largest magnitude is given.

    Only a scale of the whole tensor depends on what was not drawn: a row that holds the largest value stands for it.
    """
    if not side.is_scaled or side.granularity != TENSOR:
        return rounded(x, side)
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    stand_in = torch.zeros_like(flat[:1])
    stand_in[:, :1] = largest
    return rounded(torch.cat([flat, stand_in]), side)[:-1].reshape(x.shape)


def largest_of(x: Tensor) -> Tensor:
    """The largest finite magnitude, FP32 []."""
    size = x.detach().abs()
    return torch.where(size < float("inf"), size, 0).amax().float() if x.numel() else x.new_zeros(()).float()


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module._parameters.items() if p is not None}  # noqa: SLF001


def _fp32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


@torch.no_grad()
def _run(module: nn.Module, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The original forward with other parameters: no hooks run, and buffers stay as they are."""
    kind: Any = original_class(module)
    with torch.autocast(x.device.type, enabled=False):
        if kind is nn.Linear:
            return F.linear(x, parameters["weight"], parameters.get("bias"))
        copy = kind.__new__(kind)
        copy.__dict__.update(vars(module))
        copy.__dict__["_parameters"] = {**dict.fromkeys(module._parameters), **parameters}  # noqa: SLF001
        buffers = module._buffers  # noqa: SLF001
        copy.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in buffers.items()}
        made: Tensor = kind.forward(copy, x)
    return made.float()
