"""Numbers are written in the unit that suits them, and what is unknown or not finite is said."""

from __future__ import annotations

import math

import pytest

from deepseek_mp.report import amounts
from deepseek_mp.report.spread import Spread


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"), (math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (65536.0, "65536"),
        (0.1234567, "0.12346"), (1e30, "1e+30"), (-3, "-3"), (0.0, "0"),
    ],
)  # fmt: skip
def test_values(number: float | None, text: str) -> None:
    assert amounts.value(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (2e-6, "2 µs"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (119.0, "119 s"), (600.0, "10 min"),
        (9000.0, "2 h 30 min"), (None, "-"), (math.inf, "Infinity"),
    ],
)  # fmt: skip
def test_durations(number: float | None, text: str) -> None:
    assert amounts.seconds(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(100.0, "100 B"), (2048.0, "2 KiB"), (3.5 * 2**20, "3.5 MiB"), (2.0**40, "1024 GiB"), (None, "-")],
)
def test_sizes(number: float | None, text: str) -> None:
    assert amounts.size(number) == text


def test_energies() -> None:
    assert [amounts.energy(number) for number in (None, 12.5, 54321.0)] == ["-", "12.5 J", "54.32 kJ"]


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "-"), (0.0, "0 %"), (0.0123, "+1.23 %"), (-0.5, "-50 %"), (9.0, "+900 %"), (15.0, "16 times"),
     (math.inf, "no ratio"), (math.nan, "no ratio")],
)  # fmt: skip
def test_ratios(share: float | None, text: str) -> None:
    assert amounts.percent(share) == text


def test_a_spread_of_durations() -> None:
    spread = Spread(median=0.01, low=0.009, high=0.02, count=5)
    assert amounts.times(spread) == "10 ms (80 % within 9 ms to 20 ms)"


def test_counts() -> None:
    assert [amounts.counted(count, "step") for count in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


def test_ranges() -> None:
    assert amounts.ranges([]) == ""
    assert amounts.ranges([1, 2, 5, 6, 7, 9]) == "1,2,5-7,9"
    assert amounts.ranges([1, 3, 5, 7], limit=2) == "1,3,... 7"
    assert amounts.ranges([1, 3], limit=2) == "1,3"
