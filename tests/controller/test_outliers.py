"""Outliers count as grown from four times their kurtosis on, and do harm when two probes in a row say so."""

import pytest

from deepseek_mp.controller.adaptive_units import UnitState
from deepseek_mp.controller.outliers import GRAVE, KURTOSIS_GROWTH, do_harm, grown


def state(**values):
    return UnitState(recipe="row", **values)


def test_growth_is_since_the_layer_was_lowered():
    assert grown(state(kurtosis=3.0), 3.0 * KURTOSIS_GROWTH) == {}
    assert grown(state(kurtosis=3.0), 12.1) == {"guard": "kurtosis", "kurtosis": 12.1, "when_lowered": 3.0}
    assert grown(state(kurtosis=0.0), 12.1) == {}, "an input of zeros says nothing"


def test_what_was_lowered_before_anything_was_measured_begins_now():
    new = state()
    assert grown(new, 50.0) == {}
    assert new.kurtosis == 50.0


@pytest.mark.parametrize(
    ("costs", "harm"),
    [
        ([2.0, 2.0], [False, True]),
        ([2.0, 0.5, 2.0], [False, False, False]),
        ([2.0, 2.0, 2.0, 2.0], [False, True, False, True]),
        ([GRAVE + 0.1], [True]),
        ([float("inf")], [True]),
        ([-3.0, float("nan")], [False, False]),
    ],
)
def test_two_probes_in_a_row_say_so_or_one_that_is_grave(costs, harm):
    one = state()
    assert [do_harm(one, cost, 1.0, are_grown=True) for cost in costs] == harm


def test_without_growth_a_cost_is_not_the_outliers():
    one = state()
    assert not do_harm(one, 2.0, 1.0, are_grown=True)
    assert not do_harm(one, 100.0, 1.0, are_grown=False)
    assert not do_harm(one, 2.0, 1.0, are_grown=True)
