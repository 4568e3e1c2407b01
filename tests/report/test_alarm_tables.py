"""Alarms of many layers are few rows, and those of one run only are apart from those of both."""

from __future__ import annotations

from deepseek_mp.report.alarm_tables import alarm_difference_rows, alarm_rows
from deepseek_mp.report.alarms import AlarmDifference, Alarms


def alarms(layer: str, **values: object) -> Alarms:
    given = {"tensor": "input", "kind": "mass", "times": 1, "first_step": 7, "largest": 0.02, "limit": 0.005}
    return Alarms(layer=layer, **{**given, **values})  # type: ignore[arg-type]


def test_layers_that_differ_in_their_index_are_one_row() -> None:
    found = [alarms(f"h.{i}.up", times=1 + i, first_step=9 - i, largest=0.02 * (1 + i)) for i in range(4)]
    other = alarms("h.0.up", kind="kurtosis", largest=None, limit=None)
    assert alarm_rows([*found, other]) == [
        ("h.*.up", "4", "input", "mass", "10", "6", "0.08", "0.005"),
        ("h.0.up", "1", "input", "kurtosis", "1", "7", "-", "-"),
    ]


def test_limits_that_are_not_the_same_are_a_range() -> None:
    rows = alarm_rows([alarms("h.0", limit=3.0), alarms("h.1", limit=12.5)])
    assert [row[-1] for row in rows] == ["3..12.5"]


def test_alarms_of_one_run_and_of_both_are_apart() -> None:
    both = [AlarmDifference(a=alarms(f"h.{i}", times=2), b=alarms(f"h.{i}", first_step=3 + i)) for i in (0, 1)]
    only_b = [AlarmDifference(a=None, b=alarms(f"h.{i}")) for i in (2, 3)]
    assert alarm_difference_rows([*both, *only_b]) == [
        ("h.{0,1}", "2", "input", "mass", "4", "2", "7", "3"),
        ("h.{2,3}", "2", "input", "mass", "0", "2", "-", "7"),
    ]
