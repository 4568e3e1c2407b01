"""Hard limits on what a recipe does to a tensor, whatever the budgets say: each sees harm that the loss shows late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepseek_mp.ops.statistics import ROUNDING_TAKES, ideal_error
from deepseek_mp.precision import OPERANDS, Operand, Recipe, Role
from deepseek_mp.sensitivity import Effect, UnitReading

BY_ROW = 5.0
"""Row-balanced error over that of normal values: rows of small values are lost, which the error of the whole tensor
does not show. 128x128 blocks of output gradients diverged in the DeepSeek-V3 report while their error was normal."""
MASS_FORWARD, MASS_GRADIENT = 0.005, 0.02
"""Share of the sum of magnitudes that rounding may change. How many values become zero says little: of a GPT's
activations after a GELU up to a tenth do in FP8, harmless, for they were a millionth of the largest."""
LEAN = 0.02
"""How far a gradient's errors may lean to one side. They add up over steps: on a small GPT in FP4 the gradient of the
head, whose small values are all positive, made two thirds of what FP4 cost."""

FP16_LARGEST = 2.0**14
"""Of a tensor in FP16, a quarter of what it can hold: only a part of it was looked at, and the next may be larger."""
FP16_SCALE = 2.0**16
"""Loss scale that gradients must bear: what a dynamic policy starts with."""
FP16_UNDERFLOW = 1e-4
"""Share of a gradient's values that may become zero in FP16 without a loss scale."""
_NARROW_RANGE = 8
"""Bits of the exponent below which an unscaled format has not the range of FP32."""


def out_of_range(reading: UnitReading, recipe: Recipe) -> str:
    """Why the range of an unscaled format is not safe for a unit's tensors, in words; empty where it is."""
    for role in Role:
        for operand in OPERANDS[role]:
            side = recipe.operand(role, operand)
            if side.is_scaled or side.format.exponent_bits >= _NARROW_RANGE:
                continue
            is_gradient = operand is Operand.GRAD_OUTPUT
            largest = reading.spreads[operand]["amax"] * (FP16_SCALE if is_gradient else 1.0)
            if largest > FP16_LARGEST:
                return f"{operand} reaches {largest:.2g}, above {FP16_LARGEST:g}"
            lost = reading.effects[recipe.name].errors[role, operand]["underflow"]
            if is_gradient and lost > FP16_UNDERFLOW:
                return f"{lost:.2%} of {operand} become zero"
    return ""


def broken(effect: Effect, recipe: Recipe, roles: Sequence[Role]) -> str:
    """The limits that the recipe breaks in these products, in words; empty where it breaks none."""
    return "; ".join(dict.fromkeys(words for role in roles for words in violations(effect, recipe, role)))


def violations(effect: Effect, recipe: Recipe, role: Role) -> Iterator[str]:
    """What a recipe does to the operands of one product beyond the limits, in words with numbers."""
    for operand in OPERANDS[role]:
        side, errors = recipe.operand(role, operand), effect.errors[role, operand]
        if errors["overflow"] > 0:
            yield f"{errors['overflow']:.2%} of {operand} overflow"
        if not side.is_scaled:
            continue
        ideal = ideal_error(side.format)
        if errors["by_row"] > BY_ROW * ideal:
            yield f"row-balanced error of {operand} is {errors['by_row'] / ideal:.1f} times the format's"
        if errors["product"] > BY_ROW * ideal:
            yield f"error of {role} by {operand} is {errors['product'] / ideal:.1f} times the format's"
        most = ROUNDING_TAKES * ideal + (MASS_GRADIENT if operand is Operand.GRAD_OUTPUT else MASS_FORWARD)
        if abs(errors["mass"]) > most:
            yield f"{operand} {'loses' if errors['mass'] < 0 else 'gains'} {abs(errors['mass']):.2%} of its magnitude"
        if operand is Operand.GRAD_OUTPUT and errors["lean"] > LEAN:
            yield f"errors of {operand} lean to one side by {errors['lean']:.3f}"
