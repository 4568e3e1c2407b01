"""The text of a comparison names what differs, where, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_mp.precision import Decision, Reason
from deepseek_mp.report import compare_runs, render_difference
from deepseek_mp.report.difference_text import precision_rows
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
