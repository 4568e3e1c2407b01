"""Median and percentiles agree with NumPy's, and leave out what is no number."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deepseek_mp.report.spread import quantile, spread


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpy_s(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    found = spread(values.tolist())
    assert found is not None
    low, median, high = np.percentile(values, [10, 50, 90])
    assert (found.low, found.median, found.high) == pytest.approx((low, median, high))
    assert found.count == count
    assert found.to_json() == {"median": found.median, "low": found.low, "high": found.high, "count": count}


def test_what_is_not_finite_is_left_out() -> None:
    found = spread([math.nan, 3.0, None, math.inf])
    assert found is not None
    assert (found.median, found.count) == (3.0, 1)
    assert spread([None, math.nan]) is None
    assert spread([]) is None


def test_a_quantile_lies_between_two_values_in_proportion() -> None:
    assert quantile([0.0, 10.0], 0.25) == 2.5
