"""A line of blocks follows its values, whatever they are."""

from __future__ import annotations

import math

import pytest

from deepseek_mp.report.curve import ASCII_BLOCKS, BLOCKS, spaced, sparkline


def test_a_falling_line_falls() -> None:
    assert sparkline([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]) == BLOCKS[::-1]
    assert sparkline([0.0, 7.0], blocks=ASCII_BLOCKS) == "_#"


def test_more_values_than_characters_are_averaged() -> None:
    assert sparkline([0.0, 2.0, 7.0, 9.0], width=2) == BLOCKS[0] + BLOCKS[-1]
    line = sparkline([float(value) for value in range(1000)], width=60)
    assert len(line) == 60
    assert list(line) == sorted(line)


def test_what_is_not_finite_is_marked_and_shifts_nothing() -> None:
    assert sparkline([0.0, math.nan, math.inf, 1.0]) == f"{BLOCKS[0]}!!{BLOCKS[-1]}"
    assert sparkline([math.nan]) == "!"


def test_equal_huge_and_no_values() -> None:
    assert sparkline([2.0, 2.0]) == BLOCKS[0] * 2
    assert sparkline([-1.7e308, 1.7e308]) == BLOCKS[0] + BLOCKS[-1]
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(0, 5, []), (3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (100, 3, [0, 50, 99]), (9, 1, [8]), (9, 0, [])],
)
def test_places_are_spaced_from_the_first_to_the_last(count: int, wanted: int, expected: list[int]) -> None:
    assert spaced(count, wanted) == expected
