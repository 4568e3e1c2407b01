"""The text of a comparison names what differs, where, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_mp.precision import Decision, Reason
from deepseek_mp.report import compare_runs, render_difference
from deepseek_mp.report.difference_text import STATISTIC_ROWS, precision_rows
from deepseek_mp.report.products import LayerDifference

Record = Callable[..., Path]
LAYERS = [f"blocks.{i}.mlp" for i in range(50)]


def decisions(recipe: str, step: int = 0, reason: Reason = Reason.REQUESTED) -> list[tuple[int, Decision]]:
    return [(step, Decision(layer=name, old="fp32", new=recipe, reason=reason)) for name in LAYERS]


def words(text: str) -> str:
    return " ".join(text.split())


def test_two_runs_that_differ_in_everything(record: Record) -> None:
    a = record("a", losses=[2.0] * 20, decisions=decisions("bf16"), lines={3: {"status": "skipped", "reason": "why"}})
    b = record(
        "b",
        losses=[2.0, 2.02, *[3.0] * 20],
        info={"versions": {"torch": "2.11.0"}},
        decisions=decisions("row", reason=Reason.PINNED),
    )
    text = render_difference(compare_runs(a, b), 110)
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 110
    rows = [line.split() for line in text.splitlines()]
    assert ["versions.torch", "2.13.0", "2.11.0"] in rows
    assert ["blocks.*.mlp", "50", "bf16", "row"] in rows
    assert ["0", "blocks.*.mlp", "50", "fp32", "bf16", "requested"] in rows
    assert ["0", "blocks.*.mlp", "50", "fp32", "row", "pinned"] in rows
    assert "first differs at step 2 (2 and 2.02, +1 %)" in words(text)
    assert "by more than 5 % first at step 3 (2 and 3, +50 %), in 18 of 20 shared steps" in words(text)
    assert "mean of the last 10: 2 and 3 (+50 %)" in words(text)
    assert ["20", "2", "3", "+50", "%"] in rows
    assert ["skipped", "why", "1", "3"] in rows
    assert "B has 2 steps with a loss that the other lacks" in text
    assert "loss scale equal in 20 shared steps" in words(text)


def test_equal_runs_say_so_in_few_lines(record: Record) -> None:
    path = record(decisions=decisions("bf16"))
    text = render_difference(compare_runs(path, path), 100)
    assert "loss           equal in 3 shared steps" in text
    assert "differ" not in text
    assert "only" not in text


def test_runs_that_share_no_step(record: Record) -> None:
    text = render_difference(compare_runs(record("a"), record("b", after=10)), 100)
    assert "no step has it in both" in text
    assert "loss by step" not in text


def test_a_decision_that_both_have_at_another_step(record: Record) -> None:
    a, b = record("a", decisions=decisions("bf16")), record("b", decisions=decisions("bf16", step=2))
    rows = [line.split() for line in render_difference(compare_runs(a, b), 100).splitlines()]
    assert ["blocks.*.mlp", "50", "bf16", "requested", "0", "2"] in rows


def test_a_run_that_diverged(record: Record) -> None:
    text = words(render_difference(compare_runs(record("a"), record("b", losses=(3.0, math.nan, math.nan))), 100))
    assert "by more than 5 % first at step 2 (2 and NaN, no ratio)" in text
    assert "B: the loss is not finite in 2 steps" in text


def test_a_tolerance_that_is_never_exceeded(record: Record) -> None:
    found = compare_runs(record("a"), record("b", losses=(3.0, 2.01, 1.0)), tolerance=0.1)
    assert "never by more than 10 % in 3 shared steps" in words(render_difference(found, 200))


@pytest.mark.parametrize("roles", [("wgrad",), ("fprop", "dgrad", "wgrad")])
def test_where_one_role_differs_its_operands_are_told(roles: tuple[str, ...]) -> None:
    found = [
        LayerDifference(layer=name, role=role, a="row", b="mine", product_a=f"{role} one", product_b="other")
        for name in ("h.0", "h.1")
        for role in roles
    ]
    if len(roles) == 1:
        assert precision_rows(found) == [("h.*", "2", "wgrad", "row", "mine", "wgrad one", "other")]
    else:
        assert precision_rows(found) == [("h.*", "2", "", "row", "mine", "", "")]


def with_statistics(record: Record, name: str, medians: dict[str, dict[str, float]], **more: Any) -> Path:
    """A run with one sample: field -> layer -> value, all of inputs."""
    layers: dict[str, Any] = {}
    for field, by_layer in medians.items():
        for layer, value in by_layer.items():
            tensor = layers.setdefault(layer, {"tensors": {"input": {"samples": 1, "spread": {}}}})
            tensor["tensors"]["input"]["spread"][field] = {"last": value}
    return record(name, lines={3: {"statistics": layers, **more}})


def test_layers_whose_statistics_differ_most(record: Record) -> None:
    names = [f"h.{i}" for i in range(8)]
    a = with_statistics(record, "a", {"rms": dict.fromkeys(names, 1.0), "amax": {"h.0": 5.0, "": 4.0}})
    b = {"rms": {name: 1.0 + i for i, name in enumerate(names)}, "amax": {"h.0": 5.1, "": 6.0}}
    text = render_difference(compare_runs(a, with_statistics(record, "b", b)), 100)
    rows = [line.split() for line in text.splitlines()]
    start = rows.index(["input", "rms", "7", "of", "8", "h.7", "1", "8", "+700", "%"])
    assert rows[start + 1 : start + 4] == [
        ["h.6", "1", "7", "+600", "%"],
        ["h.5", "1", "6", "+500", "%"],
        ["input", "amax", "1", "of", "2", "(model)", "4", "6", "+50", "%"],
    ]
    assert "2 statistics of up to 8 layers compared; medians are more than 5 % apart in 2" in words(text)


def test_the_table_of_statistics_is_short(record: Record) -> None:
    fields = [f"field{i:02}" for i in range(40)]
    a = with_statistics(record, "a", {field: dict.fromkeys("xyz", 1.0) for field in fields})
    b = with_statistics(record, "b", {field: dict.fromkeys("xyz", 2.0) for field in fields})
    text = render_difference(compare_runs(a, b), 100)
    shown = STATISTIC_ROWS // 3
    assert sum("input field" in line for line in text.splitlines()) == shown
    assert f"... and {40 - shown} more statistics" in text


def test_alarms_storage_and_callbacks_that_differ(record: Record) -> None:
    alarm = {"layer": "h.3", "tensor": "input", "kind": "mass", "value": 0.02, "limit": 0.005}
    stored = {"layer": "h.0.weight", "kind": "storage", "old": "fp32", "new": "bf16_sr", "reason": "noise_small"}
    info = {"callbacks": {"Stored": {"every": 3}}}
    a = record("a", info=info, decisions=[(1, stored), (1, {**stored, "layer": "h.1.weight"})])
    b = record("b", info={}, lines={2: {"alarms": [alarm, alarm], "statistics": {"x": {"updates": 1}}}})
    text = render_difference(compare_runs(a, b), 100)
    rows = [line.split() for line in text.splitlines()]
    assert ["h.*.weight", "2", "bf16_sr", "(no", "decision)"] in rows
    assert ["h.3", "1", "input", "mass", "0", "2", "-", "2"] in rows
    assert ["callbacks.Stored", '{"every":', "3}", "(not", "recorded)"] in rows
    assert ["alarms", "0", "2", "no", "ratio"] in rows


def test_a_run_without_statistics_is_a_note(record: Record) -> None:
    a = with_statistics(record, "a", {"rms": {"x": 1.0}})
    assert "- B has no statistics by layer" in render_difference(compare_runs(a, record("b")), 100)
