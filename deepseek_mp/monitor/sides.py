"""What each tensor of a layer is rounded to: by the recipe in use, and by the formats one asks about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from deepseek_mp import backends
from deepseek_mp.backends import Capabilities, fp8_recipe
from deepseek_mp.errors import FormatError
from deepseek_mp.monitor import internals
from deepseek_mp.monitor.subjects import Subject
from deepseek_mp.nn.unit import CONVOLUTIONS, Unit, multiplies
from deepseek_mp.ops.dtypes import format_of
from deepseek_mp.precision import FORMATS, RECIPES, Operand, Recipe, Role, ScaleRule
from deepseek_mp.precision.recipe import NARROWEST_PLAIN_BITS, OperandRecipe
from deepseek_mp.precision.recipes import uniform

Sides = dict[Operand, OperandRecipe]
"""What each of the three tensors is rounded to."""
READ_IN = {Operand.INPUT: Role.FPROP, Operand.WEIGHT: Role.FPROP, Operand.GRAD_OUTPUT: Role.DGRAD}
"""The product as whose operand a tensor is looked at: in it a row is a token or pixel, or an output of the weight."""


def sides_of(recipe: Recipe) -> Sides:
    """The operands of a recipe."""
    return {operand: recipe.operand(role, operand) for operand, role in READ_IN.items()}


def what_if(names: Sequence[str], capabilities: Capabilities) -> dict[str, Sides]:
    """What the formats and recipes of these names would do to each tensor."""
    return {name: _what_if(name, capabilities) for name in names}


def _what_if(name: str, capabilities: Capabilities) -> Sides:
    best = fp8_recipe(capabilities)
    if name in RECIPES:
        return sides_of(best if name == "fp8" else RECIPES[name])
    format = FORMATS[name]
    if format.is_float and format.storage_bits >= NARROWEST_PLAIN_BITS:
        return sides_of(uniform(format))
    scaled = sides_of(best).items()
    return {operand: replace(side, format=format, rule=ScaleRule.CURRENT) for operand, side in scaled}


def in_use(subject: Subject) -> Recipe:
    """The recipe that a layer runs in, called from here: its plan's, else autocast's or that of its parameters."""
    device, module = subject.weight.device, subject.module
    recipe = _stored(subject.weight.dtype)
    if multiplies(subject.kind):
        if isinstance(module, Unit):
            recipe = module.unit_precision.recipe
        elif (dtype := internals.autocast_type(device.type)) is not None:
            recipe = RECIPES[format_of(dtype)]
        if recipe.name == "fp32":  # by the device's flags, its products may be of another format
            mode = backends.fp32_mode(device, "conv" if subject.kind in CONVOLUTIONS else "matmul")
            recipe = recipe if mode == "ieee" else RECIPES[mode]
    return recipe


def _stored(dtype: torch.dtype) -> Recipe:
    """The plain recipe of the format that a parameter is stored in; fp32 where there is none."""
    try:
        return RECIPES.get(format_of(dtype), RECIPES["fp32"])
    except FormatError:
        return RECIPES["fp32"]
