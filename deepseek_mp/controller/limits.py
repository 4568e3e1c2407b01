"""Hard limits on what a recipe does to a tensor, whatever the budgets say: each sees harm that the loss shows late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepseek_mp.precision import OPERANDS, Format, Operand, Recipe, Role
from deepseek_mp.sensitivity import Effect, UnitReading

BY_ROW = 5.0
"""Row-balanced error over that of normal values: rows of small values are lost, which the error of the whole tensor
does not show. 128x128 blocks of output gradients diverged in the DeepSeek-V3 report while their error was normal."""
UNDERFLOW_FORWARD, UNDERFLOW_GRADIENT = 0.005, 0.05
"""Share of the values that become zero."""
BIAS = 0.02
"""Mean relative error of a gradient's values. Errors of one sign add up over steps: on a small GPT in FP4 one biased
gradient made two thirds of what FP4 cost."""

CROWDED = 0.25
"""Share of the limit on what becomes zero from which on outliers are taken to do harm."""
EASE = 1.5
"""How many times what is unavoidable in the format comes on top: what becomes zero is an error of one sign too."""

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


def ideal_error(format: Format) -> float:
    """The relative error energy of normal values in range, rounded to the nearest: 0.044 / 4^mantissa bits."""
    return 0.044 * 4.0**-format.mantissa_bits


def ideal_underflow(format: Format) -> float:
    """The share of normal values that become zero at best: those below half the smallest value, where a group's largest
    is about two standard deviations and takes the format's largest value. 7 % for 4 bits, nothing for 8.
    """
    return 0.8 * format.smallest_subnormal / format.max


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
        ideal, lost = ideal_error(side.format), EASE * ideal_underflow(side.format)
        if errors["by_row"] > BY_ROW * ideal:
            yield f"row-balanced error of {operand} is {errors['by_row'] / ideal:.1f} times the format's"
        is_gradient = operand is Operand.GRAD_OUTPUT
        most = lost + (UNDERFLOW_GRADIENT if is_gradient else UNDERFLOW_FORWARD)
        if errors["underflow"] > most:
            yield f"{errors['underflow']:.2%} of {operand} become zero"
        if is_gradient and abs(errors["bias"]) > BIAS + lost:
            yield f"{operand} is biased by {errors['bias']:.3f}"


def is_crowded_out(effect: Effect, recipe: Recipe, roles: Sequence[Role]) -> bool:
    """Whether small values of the input begin to become zero in these products, beside what is large in it."""
    reads = [role for role in roles if Operand.INPUT in OPERANDS[role]]
    formats = {role: recipe.operand(role, Operand.INPUT).format for role in reads}
    limits = {role: CROWDED * UNDERFLOW_FORWARD + EASE * ideal_underflow(formats[role]) for role in reads}
    return any(effect.errors[role, Operand.INPUT]["underflow"] > limits[role] for role in reads)
