"""Alarms are counted by layer, tensor and statistic, and two runs part where these counts or first steps do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_mp.records import read_run
from deepseek_mp.report.alarms import Alarms, compare_alarms, read_alarms

Record = Callable[..., Path]


def alarm(layer: str, tensor: str = "input", kind: str = "mass", value: Any = 0.02, limit: float = 0.005) -> dict:
    return {"step": 999, "layer": layer, "tensor": tensor, "kind": kind, "value": value, "limit": limit}


def alarms(layer: str, times: int = 1, first_step: int = 1) -> Alarms:
    return Alarms(layer=layer, tensor="input", kind="mass", times=times, first_step=first_step, largest=1.0, limit=0.5)


def test_alarms_are_counted_by_what_they_are_about(record: Record) -> None:
    path = record(
        losses=(4.0, 3.0, 2.0, 1.0),
        lines={
            2: {"alarms": [alarm("b", value=0.02, limit=0.01), alarm("a", "grad_output")]},
            4: {"alarms": [alarm("b", value=0.04, limit=0.03), alarm("b", kind="kurtosis")]},
        },
    )
    found = read_alarms(read_run(path))
    assert [(a.what, a.times, a.first_step, a.largest, a.limit) for a in found] == [
        (("b", "input", "mass"), 2, 2, 0.04, 0.03),
        (("a", "grad_output", "mass"), 1, 2, 0.02, 0.005),
        (("b", "input", "kurtosis"), 1, 4, 0.02, 0.005),
    ]


def test_the_largest_value_has_its_own_limit(record: Record) -> None:
    path = record(lines={1: {"alarms": [alarm("b", value=9.0, limit=1.0), alarm("b", value=3.0, limit=2.0)]}})
    assert [(a.times, a.largest, a.limit) for a in read_alarms(read_run(path))] == [(2, 9.0, 1.0)]


def test_alarms_of_steps_that_were_made_again_do_not_count(record: Record) -> None:
    record(lines={2: {"alarms": [alarm("a")]}, 3: {"alarms": [alarm("a")]}})
    path = record(losses=(2.0,), after=2)
    assert [(a.layer, a.times, a.first_step) for a in read_alarms(read_run(path))] == [("a", 1, 2)]


def test_damaged_alarms_are_left_out(record: Record) -> None:
    path = record(
        lines={1: {"alarms": 3}, 2: {"alarms": ["x", {"layer": "a"}]}, 3: {"alarms": [alarm("b", value="?")]}}
    )
    found = read_alarms(read_run(path))
    assert [(a.what, a.largest, a.limit) for a in found] == [
        (("a", "", ""), None, None), (("b", "input", "mass"), None, 0.005)
    ]  # fmt: skip


def test_runs_part_where_alarms_are_not_alike() -> None:
    a = [alarms("same"), alarms("more"), alarms("later"), alarms("gone")]
    b = [alarms("same"), alarms("more", times=2), alarms("later", first_step=5), alarms("new")]
    found = compare_alarms(a, b)
    assert [difference.what[0] for difference in found] == ["more", "later", "gone", "new"]
    assert [(d.a is None, d.b is None) for d in found] == [(False, False), (False, False), (False, True), (True, False)]
    assert found[3].to_json() == {
        "layer": "new", "tensor": "input", "kind": "mass", "a": None, "b": alarms("new").to_json()
    }  # fmt: skip
