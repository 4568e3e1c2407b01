"""Two series part where their values do, and what is not finite is no exception."""

from __future__ import annotations

import math

import pytest

from deepseek_mp.report.parting import Point, part, relative

A = {1: 4.0, 2: 2.0, 3: 1.0, 4: 1.0}


def test_equal_series_part_nowhere() -> None:
    found = part(A, dict(A), 0.05)
    assert (found.compared, found.unequal, found.beyond, found.only_a, found.only_b) == (4, 0, 0, 0, 0)
    assert (found.first_unequal, found.first_beyond, found.largest) == (None, None, None)
    assert found.final == Point(step=4, a=2.0, b=2.0)


def test_the_first_steps_of_both_kinds_and_the_largest() -> None:
    found = part(A, {1: 4.0, 2: 2.02, 3: 1.5, 4: 0.9}, 0.05)
    assert (found.unequal, found.beyond) == (3, 2)
    assert found.first_unequal == Point(step=2, a=2.0, b=2.02)
    assert found.first_beyond == found.largest == Point(step=3, a=1.0, b=1.5)
    assert found.largest.relative == 0.5
    assert found.to_json()["largest"] == {"step": 3, "a": 1.0, "b": 1.5, "relative": 0.5}


def test_a_difference_of_exactly_the_tolerance_is_within_it() -> None:
    assert part({1: 2.0}, {1: 3.0}, 0.5).first_beyond is None
    assert part({1: 2.0}, {1: 3.0}, 0.49).first_beyond is not None


def test_only_shared_steps_are_compared() -> None:
    found = part(A, {3: 1.0, 4: 1.0, 5: 1.0}, 0.05)
    assert (found.compared, found.only_a, found.only_b) == (2, 2, 1)
    nothing = part(A, {}, 0.05)
    assert (nothing.compared, nothing.final) == (0, None)


def test_the_end_is_the_mean_of_the_last_ten() -> None:
    a = {step: float(step) for step in range(1, 31)}
    found = part(a, {step: value + 1 for step, value in a.items()}, 0.05)
    assert found.final == Point(step=30, a=25.5, b=26.5)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (2.0, 3.0, 0.5), (2.0, 1.0, -0.5), (-2.0, -1.0, 0.5), (math.nan, math.nan, 0.0), (math.inf, math.inf, 0.0),
        (1.0, math.nan, math.inf), (math.inf, 1.0, math.inf), (0.0, 1.0, math.inf), (0.0, -1.0, -math.inf),
        (0.0, 0.0, 0.0),
    ],
)  # fmt: skip
def test_relative_differences(a: float, b: float, expected: float) -> None:
    assert relative(a, b) == expected


def test_a_run_that_became_nan_parts_there() -> None:
    found = part(A, {**A, 3: math.nan, 4: math.nan}, 0.05)
    assert found.first_beyond is not None
    assert found.first_beyond.step == 3
    assert found.final is not None
    assert math.isnan(found.final.b)
