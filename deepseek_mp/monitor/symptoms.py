"""The numbers of a layer's latest sample that have a limit, each with it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from deepseek_mp.monitor.alarms import Limits, Reading, ideal_error
from deepseek_mp.monitor.sides import Sides
from deepseek_mp.monitor.store import TENSORS, UPDATE, Parts
from deepseek_mp.monitor.updates import UPDATE_FIELDS
from deepseek_mp.ops.statistics import ERROR_FIELDS, SPREAD_FIELDS
from deepseek_mp.precision import Operand

IN_USE = 1
"""The row of a block with the errors of the format in use."""
NORMAL_KURTOSIS = 3.0


def symptoms(parts: Parts, unit: int, sampled: list[str], sides: Sides, limits: Limits) -> Iterator[Reading]:
    """Readings of those tensors of a layer that were sampled; `parts` on the host, `sides` those in use."""
    for operand in Operand:
        if operand.value in sampled:
            yield from _of_rounding(parts.last[unit, TENSORS.index(operand.value), IN_USE], operand, sides, limits)
    if Operand.INPUT.value in sampled:
        yield from _of_outliers(parts, unit, limits)
    if TENSORS[UPDATE] in sampled:
        yield from _of_update(parts, unit, limits)


def _of_rounding(errors: Tensor, operand: Operand, sides: Sides, limits: Limits) -> Iterator[Reading]:
    found = dict(zip(ERROR_FIELDS, errors.tolist(), strict=False))
    tensor, is_gradient = operand.value, operand is Operand.GRAD_OUTPUT
    underflow = limits.gradient_underflow if is_gradient else limits.underflow
    if underflow is not None:
        yield tensor, "underflow", found["underflow"], underflow, limits.in_a_row
    if limits.overflow is not None:
        yield tensor, "overflow", found["overflow"], limits.overflow, limits.in_a_row if is_gradient else 1
    if limits.bias is not None and is_gradient:
        yield tensor, "bias", abs(found["bias"]), limits.bias, limits.in_a_row
    ideal = ideal_error(sides[operand].format)
    if limits.by_row is not None and ideal is not None:
        yield tensor, "by_row", found["by_row"], limits.by_row * ideal, limits.in_a_row


def _of_outliers(parts: Parts, unit: int, limits: Limits) -> Iterator[Reading]:
    if limits.kurtosis is None:
        return
    place = unit, TENSORS.index("input"), 0, SPREAD_FIELDS.index("kurtosis")
    now, first = float(parts.last[place]), float(parts.first[place])
    yield "input", "kurtosis", now, limits.kurtosis * max(first, NORMAL_KURTOSIS), limits.in_a_row


def _of_update(parts: Parts, unit: int, limits: Limits) -> Iterator[Reading]:
    found = dict(zip(UPDATE_FIELDS, parts.last[unit, UPDATE, 0].tolist(), strict=True))
    tensor = TENSORS[UPDATE]
    if float(parts.count[unit, UPDATE]) > limits.warmup:
        for kind, limit in (("spike", limits.spike), ("rms", limits.rms)):
            if limit is not None and found[kind] == found[kind]:  # not NaN: the optimizer has second moments
                yield tensor, kind, found[kind], limit, limits.spikes_in_a_row
    # Of a weight in 32 bits BF16 would lose it, but nothing does.
    if limits.edq is not None and found["edq"] != found["edq"]:
        yield tensor, "edq", found["lost"], 1 - limits.edq, limits.in_a_row
