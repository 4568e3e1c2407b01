"""The text of a report has the facts, in lines that fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_mp.precision import Decision, PrecisionPlan, Reason, Role
from deepseek_mp.report import render_outcome, render_report, report_run
from deepseek_mp.report.curve import ASCII_BLOCKS
from deepseek_mp.report.history import Step
from deepseek_mp.report.text import SHOWN_ROWS, assemble, is_off, shortened, skipped_rows

Record = Callable[..., Path]


LATER = {
    "versions": {"torch": "2.11.0"},
    "callbacks": {"Live": {"budget": 1e-3, "kept": ["a", "b"], "off": False}, "Plain": {"off": None}},
}


def eventful(record: Record) -> Path:
    """A run in which everything happened that a report can tell."""
    layers = [f"blocks.{i}.{leaf}" for i in range(100) for leaf in ("attention", "mlp")]
    decisions = [
        Decision(layer=name, old="fp32", new="bf16", reason=Reason.REQUESTED, evidence={"fp32_ms": 1.5})
        for name in layers
    ]
    changed = Decision(layer="blocks.7.mlp", old="bf16", new="fp32", reason=Reason.PINNED, detail="by hand")
    outgrown = Decision(layer="blocks.3.mlp", old="bf16", new="bf16", role=Role.DGRAD, reason=Reason.SATURATED)
    stored = {**decisions[0].to_json(), "kind": "storage", "new": "bf16_sr", "reason": "noise_small", "evidence": {}}
    compared = Decision(layer="", old="bf16", new="bf16", reason=Reason.COMPARED, evidence={"budget_scale": 0.5})
    alarm = {"layer": "blocks.2.mlp", "tensor": "input", "kind": "kurtosis", "value": 99.0, "limit": 12.0}
    fallback = {"op": "softmax", "format": "fp32", "reason": "autocast_list", "count": 12}
    record(
        losses=[5.0 - 0.1 * step for step in range(30)],
        plan=PrecisionPlan.of("bf16", {"head": "fp32"}),
        decisions=[
            *((0, d) for d in decisions),
            (9, changed),
            (11, outgrown),
            (11, compared),
            *((12, stored | {"layer": f"{name}.weight"}) for name in layers),
        ],
        lines={
            4: {"status": "skipped", "reason": "the loss is nan", "loss": math.nan, "first_bad_module": "blocks.7.mlp"},
            5: {"scale": 0.5, "alarms": [alarm]},
            6: {"fallbacks": [fallback], "samples_per_second": 1234.5, "flop_utilisation": 0.25},
            7: {"peak_memory_bytes": 3 * 2**20, "joules": 1.0},
            8: {"peak_memory_bytes": 3 * 2**20, "joules": 20.0},
        },
        ended=False,
    )
    return record(losses=[1.0, 0.5], after=30, info=LATER)


def test_everything_is_told(record: Record) -> None:
    text = render_report(report_run(eventful(record)), 110)
    for fact in (
        "torch 2.11.0",
        "32 steps, 1 of them not applied",
        "first 5, mean of the last 10 applied steps",
        "lowest 0.5 at step 32",
        "1 at first, 1 at the end, between 0.5 and 1, changed 2 times",
        "1234 samples/s, 25 % of the device's peak",
        "3 MiB",
        "20 J, 20 J per step",
        "1 comparison with FP32 changed its budgets, to 0.5 of what was set",
        "callbacks Live: budget 0.001, kept a, b; Plain",
        "did not end",
        "versions.torch 2.13.0 -> 2.11.0",
        "the loss is not finite in 1 step",
    ):
        assert fact in " ".join(text.split()), fact
    rows = [line.split() for line in text.splitlines()]
    assert ["skipped", "the", "loss", "is", "nan", "blocks.7.mlp", "1", "4"] in rows
    assert ["blocks.2.mlp", "1", "input", "kurtosis", "1", "5", "99", "12"] in rows
    assert ["blocks.*.mlp.weight", "100", "fp32", "bf16_sr", "noise_small"] in rows
    assert ["softmax", "fp32", "autocast_list", "12"] in rows
    assert ["blocks.*.attention", "100", "fp32", "bf16", "requested", "fp32_ms", "1.5"] in rows
    assert ["blocks.{0-6,8-99}.mlp", "99", "fp32", "bf16", "requested", "fp32_ms", "1.5"] in rows
    assert ["9", "blocks.7.mlp", "bf16", "fp32", "pinned", "by", "hand"] in rows
    assert ["blocks.3.mlp", "dgrad", "bf16", "1", "11"] in rows


def test_the_outcome_is_what_matters_at_the_end(record: Record) -> None:
    text = " ".join(render_outcome(report_run(eventful(record)), 110).split())
    for fact in ("blocks.*.attention 100 fp32 bf16 requested", "skipped the loss is nan", "32 steps, 1 of them not"):
        assert fact in text
    assert "gradient norm" not in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_lines_fit(record: Record, width: int) -> None:
    text = render_report(report_run(eventful(record)), width)
    assert [line for line in text.splitlines() if len(line) > width and "run " not in line] == []
    assert len(text.splitlines()) < 100  # 200 layers are a few rows


def test_a_narrow_terminal_costs_no_fact(record: Record) -> None:
    text = render_report(report_run(eventful(record)), 40)
    assert "autocast_list" in text
    assert "32 steps" in text


def test_a_run_of_which_nothing_is_known_but_its_start(record: Record) -> None:
    text = render_report(report_run(record(losses=(), info={})), 80)
    assert text.splitlines()[1:] == [
        "", "notes", "  - no step is recorded", "  - no plan is recorded", "  - no decision is recorded"
    ]  # fmt: skip


def test_the_curve_in_ascii(record: Record) -> None:
    text = render_report(report_run(record(losses=(2.0, math.nan, 1.0))), 80, ASCII_BLOCKS)
    assert "  #!_" in text.splitlines()
    assert text.isascii()
    assert "NaN" in text


def test_skipped_steps_are_counted_by_their_reason() -> None:
    steps = [Step(attempt=1, step=s, status="skipped", reason="overflow", first_bad_module="a") for s in (3, 4, 5, 9)]
    steps.append(Step(attempt=1, step=7, status="no_grads", reason="nothing"))
    assert skipped_rows(steps) == [("skipped", "overflow", "a", "4", "3-5,9"), ("no_grads", "nothing", "", "1", "7")]


def test_zero_is_a_setting(record: Record) -> None:
    assert not is_off(0)
    assert all(map(is_off, (None, False, [], "")))
    assert "seed 0" in render_report(report_run(record()), 80)


def test_sections_without_lines_are_left_out() -> None:
    assert assemble("title", [("a", []), ("b", ["x"])]) == "title\n\nb\n  x"


def test_a_long_table_says_how_many_rows_are_missing() -> None:
    rows = [[f"row {place}"] for place in range(SHOWN_ROWS + 1)]
    assert shortened(["name"], rows, 80, "row")[-2:] == [f"row {SHOWN_ROWS - 1}", "... and 1 more row"]
    assert shortened(["name"], rows[:-1], 80, "row")[-1] == f"row {SHOWN_ROWS - 1}"
