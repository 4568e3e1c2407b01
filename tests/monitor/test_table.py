"""Plain-text tables."""

from __future__ import annotations

from deepseek_mp.monitor.table import columns, few


def test_numbers_to_the_right_and_text_to_the_left() -> None:
    assert columns([("name", "n", "why"), ("a", "12", "long words"), ("bcdef", ".", "x")]) == [
        "name    n  why",
        "---------------------",
        "a      12  long words",
        "bcdef   .  x",
    ]


def test_few_names() -> None:
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few(["a", "b", "c", "d"]) == "a, b, c and 1 more"
