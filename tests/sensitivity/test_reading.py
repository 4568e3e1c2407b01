"""What counts of a measured effect, and its form on disk."""

import json
import math

import pytest

from deepseek_mp.precision import Operand, Role
from deepseek_mp.sensitivity.measure import PRODUCT_OPERANDS
from deepseek_mp.sensitivity.reading import Effect, UnitReading


def effect(first, standard_error=1.0, second=0.5):
    errors = {which: {"product": 1e-3} for which in PRODUCT_OPERANDS}
    return Effect(first=first, standard_error=standard_error, second=second, errors=errors)


@pytest.mark.parametrize(
    ("first", "expected"),
    [(1.9, 0.5), (2.1, 2.6), (-5.0, 0.5), (math.inf, math.inf), (math.nan, math.inf)],
)
def test_a_rise_counts_beyond_doubt_and_a_fall_never(first, expected):
    assert effect(first).loss_change == pytest.approx(expected)


def test_an_infinite_second_order_is_infinite():
    assert effect(0.0, second=math.inf).loss_change == math.inf


def test_a_reading_survives_json():
    reading = UnitReading(
        order=3,
        batches=2,
        calls=4,
        effects={"bf16": effect(0.25)},
        energy=1.0,
        row_energy=2.0,
        spreads={Operand.INPUT: {"amax": 3.0}},
    )
    again = UnitReading.from_json(json.loads(json.dumps(reading.to_json())))
    assert again == reading
    assert again.effects["bf16"].product_error(Role.WGRAD, Operand.INPUT) == 1e-3


def reading(calls, **spread):
    return UnitReading(
        order=0,
        batches=calls,
        calls=calls,
        effects={},
        energy=1.0,
        row_energy=1.0,
        spreads={Operand.INPUT: spread, Operand.GRAD_OUTPUT: spread},
    )


@pytest.mark.parametrize(("first", "then"), [(8.0, 2.0), (2.0, 8.0)])
def test_of_several_batches_the_largest_magnitude_is_the_largest(first, then):
    both = reading(3, amax=first, rms=1.0).joined(reading(1, amax=then, rms=2.0))
    for which in (Operand.INPUT, Operand.GRAD_OUTPUT):
        assert both.spreads[which] == {"amax": 8.0, "rms": 1.25}
