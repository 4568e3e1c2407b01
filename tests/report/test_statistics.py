"""Medians count each sample once, and the layers that differ most come first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepseek_mp.records import read_run
from deepseek_mp.report.spread import Spread, spread
from deepseek_mp.report.statistics import MOST, compare_statistics, read_spreads

Record = Callable[..., Path]


def layer(samples: int, rms: float | None, **more: Any) -> dict[str, Any]:
    """A layer as the monitor writes it down."""
    tensor = {
        "samples": samples,
        "spread": {"rms": {"last": rms, "mean": -1.0}},
        "errors": {"in_use": {"mass": {"last": 0.25, "mean": -1.0}}, "fp16": {"mass": {"last": 0.5, "mean": -1.0}}},
    }
    return {"status": "sampled", "tensors": {"input": tensor}, **more}


def at(**layers: Any) -> dict[str, Any]:
    return {"statistics": layers}


def over(*values: float) -> Spread:
    found = spread(values)
    assert found is not None
    return found


def medians(path: Path) -> dict[str, dict[str, float]]:
    found = read_spreads(read_run(path))
    return {name: {layer: one.median for layer, one in layers.items()} for name, layers in found.items()}


def test_each_sample_counts_once(record: Record) -> None:
    lines = {1: at(a=layer(1, 1.0)), 2: at(a=layer(1, 1.0)), 3: at(a=layer(2, 5.0), b=layer(1, 7.0))}
    found = medians(record(lines=lines))
    assert found["input rms"] == {"a": 3.0, "b": 7.0}
    assert found["input mass in_use"]["a"] == 0.25
    assert found["input mass fp16"]["a"] == 0.5


def test_a_resumed_run_numbers_its_samples_anew(record: Record) -> None:
    record(lines={3: at(a=layer(1, 1.0))})
    path = record(losses=(1.0,), after=3, lines={4: at(a=layer(1, 5.0))})
    assert medians(path)["input rms"] == {"a": 3.0}


def test_updates_and_counts_are_statistics_too(record: Record) -> None:
    def step(updates: int, ratio: float, bad: int) -> dict[str, Any]:
        more = {"updates": updates, "update": {"ratio": {"last": ratio, "mean": -1.0}}}
        return at(a=layer(updates, 1.0, **more, non_finite={"input": bad}, produced={"forward": 1}))

    record(lines={1: step(1, 1.0, 2), 2: step(2, 2.0, 2), 3: step(3, 3.0, 6)})
    found = medians(record(losses=(1.0,), after=3, lines={4: step(1, 4.0, 1)}))
    assert found["update ratio"] == {"a": 2.5}
    assert found["input bad_values"] == {"a": 7}
    assert found["forward bad_values_made"] == {"a": 2}


@pytest.mark.parametrize(
    "damaged", [3, {"a": 3}, {"a": {"tensors": 3}}, {"a": layer(1, None)}, {"a": layer(1, math.nan)}, {"a": {}}]
)
def test_what_is_no_number_is_left_out(record: Record, damaged: Any) -> None:
    path = record(lines={1: {"statistics": damaged}, 2: at(a=layer(2, 4.0))})
    assert medians(path)["input rms"] == {"a": 4.0}


def compared(a: Mapping[str, Mapping[str, Spread]], b: Mapping[str, Mapping[str, Spread]]) -> dict[str, list[str]]:
    return {found.statistic: [pair.layer for pair in found.most] for found in compare_statistics(a, b, 0.05)}


def test_the_layers_that_differ_most_come_first_and_are_few() -> None:
    names = [f"h.{i}" for i in range(2 * MOST)]
    a = {"input rms": {name: over(1.0) for name in names}}
    b = {"input rms": {name: over(1.0 + 0.02 * i) for i, name in enumerate(names)}}
    (found,) = compare_statistics(a, b, 0.05)
    assert [pair.layer for pair in found.most] == list(reversed(names[-MOST:]))
    assert (found.compared, found.beyond) == (2 * MOST, 2 * MOST - 3)
    first = found.most[0]
    assert (first.a, first.b) == (1.0, 1.18)
    assert first.apart == pytest.approx(0.18 / 1.18)
    assert found.to_json()["most"][0]["relative"] == pytest.approx(0.18)


def test_statistics_of_what_ran_come_before_those_that_one_asked_about() -> None:
    names = ("input mass fp16", "input rms", "weight mass in_use")
    a = {name: {"x": over(1.0)} for name in names}
    b = {"input mass fp16": {"x": over(9.0)}, "input rms": {"x": over(1.1)}, "weight mass in_use": {"x": over(2.0)}}
    assert list(compared(a, b)) == ["weight mass in_use", "input rms", "input mass fp16"]


def test_a_difference_within_the_scatter_of_samples_counts_less() -> None:
    a = {"input mass in_use": {"noisy": over(-1.0, 0.1, 1.0), "steady": over(0.9, 1.0, 1.1)}}
    b = {"input mass in_use": {"noisy": over(-1.0, 0.3, 1.0), "steady": over(1.9, 2.0, 2.1)}}
    assert compared(a, b) == {"input mass in_use": ["steady", "noisy"]}


def test_a_tiny_share_in_place_of_none_is_no_difference() -> None:
    a = {"input underflow in_use": {"tiny": over(0.0), "large": over(0.1)}}
    b = {"input underflow in_use": {"tiny": over(1e-9), "large": over(0.12)}}
    (found,) = compare_statistics(a, b, 0.05)
    assert [pair.layer for pair in found.most] == ["large", "tiny"]
    assert found.beyond == 1


def test_only_what_both_runs_have_is_compared() -> None:
    a = {"input rms": {"x": over(1.0), "y": over(1.0)}, "update ratio": {"x": over(1.0)}}
    b = {"input rms": {"y": over(1.0), "z": over(3.0)}, "weight rms": {"x": over(1.0)}}
    (found,) = compare_statistics(a, b, 0.05)
    assert (found.statistic, found.compared, found.beyond, found.most) == ("input rms", 1, 0, ())
