"""`profile`: bad input ends in one line before anything is measured, and options reach what measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_mp import PrecisionPlan, ProfileReport
from deepseek_mp.cli import profile as profile_command
from deepseek_mp.cli.app import main
from deepseek_mp.cli.profile_answer import Answer
from deepseek_mp.profiler import MetricReport


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Missing argument 'TARGET'"),
        (["net.py"], "Name the function"),
        (["nett.py:job"], "no Python file 'nett.py'"),
        (["net.py:jobb"], "no function 'jobb' in net.py"),
        (["net.py:job", "--budget", "0"], "budget=0.0. Allowed: a number above zero"),
        (["net.py:job", "--noise-budget", "-1"], "noise_budget=-1.0"),
        (["net.py:job", "--recipes", "bf17"], "unknown recipe 'bf17'"),
        (["net.py:job", "--batches", "0"], "Invalid value for '--batches'"),
        (["net.py:job", "--out", "nowhere/report.json"], "--out nowhere/report.json, in a directory that is not there"),
        (["net.py:job", "--plan", "."], "--plan ., a directory"),
        (["net.py:job", "--plan", "plan.json", "--no-data"], "--plan with --no-data"),
        (["net.py:job", "--device", "bogus"], "device 'bogus' is not known to this PyTorch"),
        (["net.py:job", "--resume", "net.py"], "resume='net.py', which holds no measurements of a profile"),
        (["net.py:alone"], "a target without loader, which a profile (--no-data does without) needs"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    net: Path, refused: Callable[[list[str]], str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(["profile", *arguments])


def test_a_profile_is_plain_text_that_fits_and_the_plan_can_be_trained(
    net: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    asked = ["--device", "cpu", "--no-time", "--recipes", "bf16, row", "--emulate", "--batches", "3", "--verify", "1"]
    assert main(["profile", "net.py:job", *asked, "--plan", "plan.json", "--out", "report.json"]) == 0
    out, err = capsys.readouterr()
    assert err == "the user's own print\n"
    assert all(char.isprintable() or char == "\n" for char in out)
    assert max(map(len, out.splitlines())) <= 90
    for fact in (
        "3 batches",
        "bf16 loss",
        "fp8 loss",
        "recommended",
        "of 1e-3 allowed",
        "rank correlation",
        "plan.json",
    ):
        assert fact in out.casefold()
    assert {rule.recipe.name for rule in PrecisionPlan.load("plan.json").rules} == {"row"}
    report = ProfileReport.load("report.json")
    assert report["0"]["recommended"] == "row"
    assert str(report)
    assert (
        main(["train", "net.py:job", "--device", "cpu", "--precision", "plan.json", "--emulate", "--steps", "2"]) == 0
    )


def test_json_is_strict_and_alone(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--device", "cpu", "--no-time", "--batches", "2", "--budget", "1e-2"]
    assert main(["profile", "net.py:job", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert ProfileReport.from_json(found["report"]).budget.loss == 1e-2
    assert PrecisionPlan.from_json(found["plan"]).decisions


def test_weights_alone_need_no_loader(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "net.py:alone", "--no-data", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "no data" in out
    assert "bf16 error" in out


def test_a_metric_in_place_of_a_loader(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "net.py:metric", "--recipes", "fp32,bf16", "--plan", "plan.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["report"]
    assert found["error"] <= found["tolerance"]
    plan = PrecisionPlan.load("plan.json")
    assert plan.base.name == "fp32"
    assert {rule.pattern: rule.recipe.name for rule in plan.rules} == found["formats"]


def test_options_reach_what_measures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def answer(target: str, question: Any) -> Answer:
        seen.extend((target, question))
        report = MetricReport(formats={}, reference=1.0, error=0.0, tolerance=1.0, alone={}, runs=1)
        return Answer(report=report, plan=None)

    monkeypatch.setattr(profile_command, "answer", answer)
    options = {"recipes": "row,bf16", "budget": 0.5, "noise-budget": 0.25, "batches": 7, "verify": 3, "seed": 5}
    flags = ["--by-role", "--emulate", "--no-time", "--no-data", "--resume", "file.json", "--device", "cpu"]
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["profile", "a:b", *given, *flags]) == 0
    assert capsys.readouterr().out.startswith("metric 1")
    target, question = seen
    assert target == "a:b"
    assert vars(question) == {
        "recipes": ("row", "bf16"), "budget": 0.5, "noise_budget": 0.25, "batches": 7, "verify": 3, "by_role": True,
        "emulate": True, "timed": False, "data": False, "resume": Path("file.json"), "device": "cpu", "seed": 5,
    }  # fmt: skip
