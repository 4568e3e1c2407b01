"""What precision means: frozen values and rules, without torch and without a model."""

from deepseek_mp.precision.decision import Decision, Reason
from deepseek_mp.precision.formats import FORMATS, Format, find_format
from deepseek_mp.precision.plan import PrecisionPlan, Rule
from deepseek_mp.precision.recipe import Recipe, Rounding
from deepseek_mp.precision.recipes import RECIPES, as_fnuz, find_recipe, with_power_of_two
from deepseek_mp.precision.roles import OPERANDS, Operand, Role
from deepseek_mp.precision.scaling import GRANULARITIES, Granularity, ScaleRule

__all__ = [
    "FORMATS",
    "GRANULARITIES",
    "OPERANDS",
    "RECIPES",
    "Decision",
    "Format",
    "Granularity",
    "Operand",
    "PrecisionPlan",
    "Reason",
    "Recipe",
    "Role",
    "Rounding",
    "Rule",
    "ScaleRule",
    "as_fnuz",
    "find_format",
    "find_recipe",
    "with_power_of_two",
]
