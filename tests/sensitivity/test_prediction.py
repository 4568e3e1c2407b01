"""Prices of recipes from readings, against their formulas."""

import math

import pytest

from deepseek_mp.precision import RECIPES, Role
from deepseek_mp.sensitivity import Effect, UnitReading
from deepseek_mp.sensitivity.measure import PRODUCT_OPERANDS
from deepseek_mp.sensitivity.prediction import PATH, Predictor

ROW = RECIPES["row"]


def reading(order, energy, second=1e-3, first=0.0):
    errors = {which: {"product": 1e-3 * (place + 1)} for place, which in enumerate(PRODUCT_OPERANDS)}
    effect = Effect(first=first, standard_error=1e-4, second=second, errors=errors)
    return UnitReading(
        order=order, batches=1, calls=1, effects={"row": effect}, energy=energy, row_energy=2 * energy, spreads={}
    )


@pytest.fixture
def predictor():
    units = {"last": reading(2, 3.0), "first": reading(0, 5.0), "middle": reading(1, 2.0)}
    return Predictor(units, -2.0, curvature=0.5, kappa=10.0)


def test_the_loss_is_relative_to_its_size(predictor):
    assert predictor.loss("last", ROW) == pytest.approx(1e-3 / 2.0)


def test_noise_of_each_product(predictor):
    assert predictor.noise("last", ROW, Role.FPROP) == pytest.approx(10.0 * 0.5 * 1e-3)
    # Operands 3 and 4 are dgrad's, 5 and 6 wgrad's.
    assert predictor.noise("last", ROW, Role.DGRAD) == pytest.approx(PATH * 7e-3 * (5.0 + 2.0) / 10.0)
    assert predictor.noise("first", ROW, Role.DGRAD) == 0
    assert predictor.noise("last", ROW, Role.WGRAD) == pytest.approx(11e-3 * 6.0 / 10.0)


def test_an_overflow_has_no_price():
    predictor = Predictor({"a": reading(0, 1.0, second=math.inf)}, 1.0)
    assert predictor.loss("a", ROW) == math.inf
    assert predictor.noise("a", ROW, Role.FPROP) == math.inf


def test_a_loss_of_zero_takes_no_rise():
    assert Predictor({"a": reading(0, 1.0)}, 0.0).loss("a", ROW) == math.inf
    assert Predictor({"a": reading(0, 1.0, second=0.0)}, 0.0).loss("a", ROW) == 0
    assert Predictor({"a": reading(0, 0.0)}, 1.0).noise("a", ROW, Role.WGRAD) == 0


def test_the_second_order_alone_leaves_out_what_chance_moves():
    units = {
        "sure": reading(0, 1.0, first=0.5),
        "broken": reading(1, 1.0, second=math.inf),
        "none": reading(2, 1.0, 0.0),
    }
    predictor = Predictor(units, 2.0)
    assert predictor.loss("sure", ROW) == pytest.approx(0.2505)
    assert predictor.second_order("sure", ROW) == pytest.approx(5e-4)
    assert predictor.second_order("broken", ROW) == math.inf
    assert predictor.second_order("none", ROW) == 0
    assert Predictor(units, 0.0).second_order("sure", ROW) == math.inf
