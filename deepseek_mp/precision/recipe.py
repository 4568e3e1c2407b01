"""A recipe: the formats, granularity and scale rule of a unit's three products.

A recipe has a short name and expands to plain data; wherever the package takes a recipe it takes
either (`recipes.py` has the names). A *plain* recipe uses one unscaled format for every operand of every
product, which is what an autocast region can express. Any other is run by a unit itself, inside the
region that `Recipe.region` names. The tensor that holds a parameter stays in FP32 whatever the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from deepseek_mp.errors import ConfigError, PlanError, explain
from deepseek_mp.precision.checks import find_member, read_object, require, shown
from deepseek_mp.precision.formats import FORMATS, Format, find_format
from deepseek_mp.precision.roles import OPERANDS, Operand, Role
from deepseek_mp.precision.scaling import TENSOR, Granularity, ScaleRule, find_granularity

DEFAULT_REGION = "bf16"
"""What runs beside scaled products: it has the range of FP32, so what leaves a unit needs no scale."""
NARROWEST_PLAIN_BITS = 16
"""Below, the values of a model do not fit a format without scales."""
SCALE_BITS = 8
"""What a scale takes in memory where it is not FP32."""


class Rounding(StrEnum):
    """Which of the two values next to a number a cast takes."""

    NEAREST = "nearest"
    """The nearer one, ties to even."""
    STOCHASTIC = "stochastic"
    """Either, by chance and such that the mean is the number itself: errors of many values cancel in a sum. Each is
    larger than that of the nearest, so it is for gradients, of which many small ones add up over the steps."""


@dataclass(frozen=True, kw_only=True)
class OperandRecipe:
    """How one operand of one product is represented; each value may be given by its name.

    The granularity is that of the operand seen as [outer, contraction], as `roles` explains.
    """

    format: Format
    granularity: Granularity = TENSOR
    rule: ScaleRule = ScaleRule.NONE
    power_of_two: bool = False
    """Round scales to powers of two, so that scaling itself is exact."""
    rounding: Rounding = Rounding.NEAREST
    """Stochastic only under the rule 'current'."""
    scale_format: Format | None = None
    """The FP8 format that scales are rounded to, each divided by one FP32 scale of the whole tensor before, such that
    the largest of them is the largest value of the format. None: scales are FP32. Only under the rule 'current'."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", find_format(self.format))
        object.__setattr__(self, "granularity", find_granularity(self.granularity))
        object.__setattr__(self, "rule", find_member("scale rule", ScaleRule, self.rule))
        require("power_of_two", self.power_of_two, bool, "Pass True or False")
        object.__setattr__(self, "rounding", find_member("rounding", Rounding, self.rounding))
        if self.rounding == Rounding.STOCHASTIC and self.rule != ScaleRule.CURRENT:
            # An operand without a scale is not cast. Past scales cut what exceeds them: no rounding is unbiased then.
            passed = f"stochastic rounding of an operand with the scale rule {self.rule.value!r}"
            change = "Use rule 'current', or rounding 'nearest'"
            raise PlanError(explain(passed, "stochastic rounding with scales of the tensor itself", change))
        if self.scale_format is not None:
            object.__setattr__(self, "scale_format", find_format(self.scale_format))
            self._check_scale_format()

    def _check_scale_format(self) -> None:
        """`PlanError` if scales of this format are not what the other fields say."""
        format = self.scale_format
        assert format is not None
        if not format.is_float or format.storage_bits != SCALE_BITS or not format.mantissa_bits:
            passed, change = f"scale_format {format}", "Use one of these; scales of E8M0 are power_of_two=True"
            allowed = ", ".join(f.name for f in FORMATS.values() if f.storage_bits == SCALE_BITS and f.epsilon < 1)
        elif self.power_of_two or self.rule != ScaleRule.CURRENT:
            passed = f"scale_format {format}, power_of_two={self.power_of_two} and the scale rule {self.rule.value!r}"
            allowed, change = "rule 'current' without power_of_two", "Change them, or leave out the scale_format"
        else:
            return
        raise PlanError(explain(passed, allowed, change))

    @property
    def is_scaled(self) -> bool:
        return self.rule != ScaleRule.NONE

    def to_json(self) -> dict[str, Any]:
        values = {
            "format": self.format.name,
            "granularity": self.granularity.name,
            "rule": self.rule.value,
            "power_of_two": self.power_of_two,
        }
        # Named only where they are not the default: what was written before they existed, and its digest, stay.
        if self.rounding != Rounding.NEAREST:
            values["rounding"] = self.rounding.value
        if self.scale_format is not None:
            values["scale_format"] = self.scale_format.name
        return values

    @classmethod
    def from_json(cls, data: object) -> OperandRecipe:
        fields = ["format", "granularity", "rule", "power_of_two"]
        if isinstance(data, Mapping):
            fields += [name for name in ("rounding", "scale_format") if name in data]
        return cls(**read_object("an operand", data, fields))


@dataclass(frozen=True, kw_only=True)
class RoleRecipe:
    """How the two operands of one product are represented, in the order of `roles.OPERANDS`."""

    left: OperandRecipe
    right: OperandRecipe

    def __post_init__(self) -> None:
        require("left operand", self.left, OperandRecipe, "Pass OperandRecipe(format=...)")
        require("right operand", self.right, OperandRecipe, "Pass OperandRecipe(format=...)")

    def to_json(self) -> list[dict[str, Any]]:
        return [self.left.to_json(), self.right.to_json()]

    @classmethod
    def from_json(cls, data: object) -> RoleRecipe:
        if not isinstance(data, list | tuple) or len(data) != 2:
            raise PlanError(explain(f"a product is {shown(data)}", "a list of its two operands", "List both of them"))
        return cls(left=OperandRecipe.from_json(data[0]), right=OperandRecipe.from_json(data[1]))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats + granularity + scale rule for the three products of a unit."""

    name: str
    fprop: RoleRecipe
    dgrad: RoleRecipe
    wgrad: RoleRecipe

    def __post_init__(self) -> None:
        require("recipe name", self.name, str, "Name the recipe")
        for role in Role:
            require(f"recipe part {role.value}", self.role(role), RoleRecipe, "Pass RoleRecipe(left=..., right=...)")

    def role(self, role: Role) -> RoleRecipe:
        """The representation of both operands of the product `role`."""
        return {Role.FPROP: self.fprop, Role.DGRAD: self.dgrad, Role.WGRAD: self.wgrad}[role]

    def operand(self, role: Role, operand: Operand) -> OperandRecipe:
        """The representation of `operand` in the product `role`; `ConfigError` if it is not read there."""
        left, right = OPERANDS[role]
        if operand not in (left, right):
            raise ConfigError(
                explain(f"operand {operand!s} of {role!s}", f"{left}, {right}", "Ask for one that the product reads")
            )
        return self.role(role).left if operand == left else self.role(role).right

    def sides(self) -> Iterator[OperandRecipe]:
        """The six operands: left and right of each product."""
        for product in (self.fprop, self.dgrad, self.wgrad):
            yield product.left
            yield product.right

    @property
    def format(self) -> Format | None:
        """The one format of all operands, or None when they differ."""
        formats = {side.format for side in self.sides()}
        return formats.pop() if len(formats) == 1 else None

    @property
    def is_plain(self) -> bool:
        """Whether it is one unscaled floating format of at least 16 bits for everything."""
        format = self.format
        if format is None or not format.is_float or format.storage_bits < NARROWEST_PLAIN_BITS:
            return False
        return all(side == OperandRecipe(format=format) for side in self.sides())

    @property
    def region(self) -> str:
        """Format of the autocast region around layers of this recipe: a plain recipe's own, else bf16."""
        return self.fprop.left.format.name if self.is_plain else DEFAULT_REGION

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **{role.value: self.role(role).to_json() for role in Role}}

    @classmethod
    def from_json(cls, data: object) -> Recipe:
        roles = [role.value for role in Role]
        values = read_object("a recipe", data, ("name", *roles))
        return cls(name=values["name"], **{role: RoleRecipe.from_json(values[role]) for role in roles})

    def __str__(self) -> str:
        return self.name
