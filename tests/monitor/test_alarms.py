"""Limits, what a format does at best, and how often a number must be beyond its limit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.monitor import Alarm, Limits
from deepseek_mp.monitor.alarms import Judge, Reading


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("mass", -0.1, "None or a number from 0"),
        ("gradient_mass", "small", "None or a number from 0"),
        ("in_a_row", 0, "a whole number from 1"),
        ("warmup", 1.5, "a whole number from 0"),
        ("rms_after", -1, "a whole number from 0"),
        ("non_finite", 1, "True or False"),
    ],
)
def test_wrong_limits(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed):
        Limits(**{name: value})


def test_limits_can_be_switched_off() -> None:
    assert Limits(spike=None, rms=None, non_finite=False, warmup=0, rms_after=0).spike is None


def test_an_alarm_as_json_and_as_text() -> None:
    alarm = Alarm(step=40, layer="a.b", tensor="input", kind="by_row", value=0.012345, limit=0.01)
    assert json.loads(json.dumps(alarm.to_json())) == {
        "step": 40, "layer": "a.b", "tensor": "input", "kind": "by_row", "value": 0.012345, "limit": 0.01,
    }  # fmt: skip
    assert str(alarm) == "a.b, input: by_row 0.01235, limit 0.01 (step 40)"
    assert str(Alarm(step=1, layer="", tensor="output", kind="non_finite", value=1, limit=0)).startswith("(model), out")


def judged(values: list[float], *, wanted: int, limit: float = 1.0) -> list[int]:
    """Steps at which there was an alarm."""
    judge = Judge(Limits())

    def readings(value: float) -> Iterator[Reading]:
        yield "input", "mass", value, limit, wanted
        yield "input", "other", 0.0, limit, wanted

    return [alarm.step for step, value in enumerate(values) for alarm in judge.judge(step, "a", readings(value))]


def test_a_number_must_be_beyond_its_limit_so_often_in_a_row() -> None:
    assert judged([2, 2, 0, 2, 2, 2, 2, 2], wanted=3) == [5]
    assert judged([0, 2], wanted=1) == [1]
    assert judged([1, 1, 1], wanted=1) == []  # at the limit is not beyond it
    assert judged([2, 1, 2], wanted=1) == [0, 2]  # raised again after it was over


def test_layers_are_counted_apart() -> None:
    judge = Judge(Limits())

    def reading() -> Iterator[Reading]:
        yield "input", "mass", 2.0, 1.0, 2

    assert not list(judge.judge(1, "a", reading()))
    assert not list(judge.judge(1, "b", reading()))
    assert [alarm.layer for alarm in judge.judge(2, "b", reading())] == ["b"]
