"""The numbers of a layer's latest sample that have a limit, each with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan

from torch import Tensor

from deepseek_mp.monitor.alarms import Limits, Reading
from deepseek_mp.monitor.sides import Sides
from deepseek_mp.monitor.store import TENSORS, UPDATE, Parts
from deepseek_mp.monitor.updates import UPDATE_FIELDS
from deepseek_mp.ops.statistics import ERROR_FIELDS, ROUNDING_TAKES, SPREAD_FIELDS, ideal_error
from deepseek_mp.precision import Operand
from deepseek_mp.precision.recipe import OperandRecipe

IN_USE = 1
"""The row of a block with the errors of the format in use."""
NORMAL_KURTOSIS = 3.0
FINE_BITS = 8
"""Formats of fewer bits make some percent of any values zero: that is how they are."""
CROWDED = 0.00125
"""Share of the values that become zero from which on outliers are taken to do harm."""


def symptoms(
    parts: Parts, unit: int, sampled: Sequence[str], sides: Sides, limits: Limits, *, step: int, is_kept: bool = False
) -> Iterator[Reading]:
    """Readings of those tensors of a layer that were sampled; `parts` on the host, `sides` those in use.

    `is_kept`: the optimizer writes the layer's 16-bit weight so that it loses no updates.
    """
    for operand in Operand:
        if operand.value in sampled:
            errors = _named(ERROR_FIELDS, parts.last[unit, TENSORS.index(operand.value), IN_USE])
            yield from _of_rounding(errors, operand, sides[operand], limits)
            if operand is Operand.INPUT:
                yield from _of_outliers(parts, unit, errors["underflow"], sides[operand], limits)
    if TENSORS[UPDATE] in sampled:
        yield from _of_update(parts, unit, limits, step, is_kept=is_kept)


def _named(fields: Sequence[str], line: Tensor) -> dict[str, float]:
    return dict(zip(fields, line.tolist(), strict=False))


def _of_rounding(found: dict[str, float], operand: Operand, side: OperandRecipe, limits: Limits) -> Iterator[Reading]:
    tensor, is_gradient = operand.value, operand is Operand.GRAD_OUTPUT
    mass = limits.gradient_mass if is_gradient else limits.mass
    ideal = ideal_error(side.format) if side.format.is_float else None
    if mass is not None:
        yield tensor, "mass", abs(found["mass"]), mass + ROUNDING_TAKES * (ideal or 0.0), limits.in_a_row
    underflow = limits.gradient_underflow if is_gradient else limits.underflow
    if underflow is not None and not side.is_scaled:
        yield tensor, "underflow", found["underflow"], underflow, limits.in_a_row
    if limits.overflow is not None:
        yield tensor, "overflow", found["overflow"], limits.overflow, limits.in_a_row if is_gradient else 1
    if limits.lean is not None and is_gradient:
        yield tensor, "lean", found["lean"], limits.lean, limits.in_a_row
    if limits.by_row is not None and ideal is not None:
        yield tensor, "by_row", found["by_row"], limits.by_row * ideal, limits.in_a_row


def _of_outliers(parts: Parts, unit: int, underflow: float, side: OperandRecipe, limits: Limits) -> Iterator[Reading]:
    if limits.kurtosis is None:
        return
    line = unit, TENSORS.index(Operand.INPUT.value), 0
    now, first = (_named(SPREAD_FIELDS, plane[line])["kurtosis"] for plane in (parts.last, parts.first))
    fine = side.format.bits >= FINE_BITS
    harm = side.is_scaled and fine and underflow > CROWDED
    limit = limits.kurtosis * max(first, NORMAL_KURTOSIS)
    yield Operand.INPUT.value, "kurtosis", now if harm else 0.0, limit, limits.in_a_row


def _of_update(parts: Parts, unit: int, limits: Limits, step: int, *, is_kept: bool) -> Iterator[Reading]:
    found = _named(UPDATE_FIELDS, parts.last[unit, UPDATE, 0])
    tensor = TENSORS[UPDATE]
    if limits.spike is not None and parts.count[unit].tolist()[UPDATE] > limits.warmup:
        yield tensor, "spike", found["spike"], limits.spike, limits.spikes_in_a_row
    if limits.rms is not None and not isnan(found["rms"]) and step > limits.rms_after:
        yield tensor, "rms", found["rms"], limits.rms, limits.in_a_row
    # Of a weight in 32 bits BF16 would lose it, but nothing does. One that is rounded by chance stays where it is in
    # most steps, and moves further in the others.
    if limits.edq is not None and isnan(found["edq"]) and not is_kept:
        yield tensor, "lost", found["lost"], 1 - limits.edq, limits.in_a_row
