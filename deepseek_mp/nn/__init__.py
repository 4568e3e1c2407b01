"""Modules: which of a model's layers are units, and how a plan is put in force on them."""

from deepseek_mp.nn.chunked_loss import linear_cross_entropy
from deepseek_mp.nn.convert import apply, convert, current_plan, fp32_arithmetic, kernels_in_force, revert, unconverted
from deepseek_mp.nn.delayed import Saturated, saturated_tensors, update_scales
from deepseek_mp.nn.known_loss import computes_cross_entropy
from deepseek_mp.nn.layout import memory_format_of
from deepseek_mp.nn.survey import uncontrollable, units
from deepseek_mp.nn.unit import Unit, UnitPrecision, register_unit

__all__ = [
    "Saturated",
    "Unit",
    "UnitPrecision",
    "apply",
    "computes_cross_entropy",
    "convert",
    "current_plan",
    "fp32_arithmetic",
    "kernels_in_force",
    "linear_cross_entropy",
    "memory_format_of",
    "register_unit",
    "revert",
    "saturated_tensors",
    "uncontrollable",
    "unconverted",
    "units",
    "update_scales",
]
