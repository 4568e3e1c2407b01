"""An answer is printed and written as it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_mp import PrecisionPlan
from deepseek_mp.cli.profile_answer import Answer
from deepseek_mp.profiler import MetricReport

ANSWER = Answer(
    report=MetricReport(
        formats={"a": "bf16"}, reference=1.0, error=0.0, tolerance=0.1, alone={"a": {"bf16": float("inf")}}, runs=2
    ),
    plan=PrecisionPlan.of("fp32", {"a": "bf16"}),
)


def test_files_are_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plan = tmp_path / "report.json", tmp_path / "plan.json"
    ANSWER.deliver(out=out, plan=plan, as_json=False)
    said = capsys.readouterr().out
    assert str(out) in said
    assert f"deepseek-mp train --precision {plan}" in said
    assert json.loads(out.read_text())["formats"] == {"a": "bf16"}
    assert PrecisionPlan.load(plan) == ANSWER.plan


def test_json_is_one_document_and_files_are_written_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ANSWER.deliver(out=None, plan=tmp_path / "plan.json", as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["report"]["alone"] == {"a": {"bf16": "inf"}}
    assert PrecisionPlan.from_json(found["plan"]) == PrecisionPlan.load(tmp_path / "plan.json")


def test_nothing_is_written_that_was_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ANSWER.deliver(out=None, plan=None, as_json=False)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == f"{ANSWER.report}\n"
