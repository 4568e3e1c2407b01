"""`demo` trains for real and prints what it found; the quick form, on small models."""

from __future__ import annotations

import json
import math
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest

from deepseek_mp.cli import demo as demo_command
from deepseek_mp.cli.app import main
from deepseek_mp.workloads.demo import Comparison, DemoResult, Run


def run(mode: str, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "task": "digits", "mode": mode, "format": "fp32", "memory_format": "contiguous", "reason": f"reason of {mode}",
        "operations": {"fp32": 71}, "fallbacks": {}, "steps": 12, "first_loss": 2.5, "last_loss": 1.25,
        "validation_loss": 1.5, "validation_accuracy": 0.875, "step_ms": 10.0, "peak_memory_mib": 9.75, "total_s": 3.5,
    }  # fmt: skip
    return Run(**values | changes)


RESULT = DemoResult(
    device="cpu",
    comparisons=(
        Comparison(
            title="A model on data",
            runs=(
                run("fp32"),
                run(
                    "auto",
                    format="bf16",
                    memory_format="channels_last",
                    step_ms=4.0,
                    peak_memory_mib=None,
                    operations={"bf16": 60, "fp32": 11},
                    fallbacks={"autocast_list": 4},
                ),
            ),
        ),
    ),
)


def test_the_text_has_every_fact_of_both_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_command, "run_demo", lambda **kwargs: RESULT)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    shown = [
        "A model on data", "12 steps on cpu", "bf16, channels_last", "2.5000", "1.2500", "1.5000", "87.5 %", "10.00 ms",
        "4.00 ms", "9.8 MiB", "unknown", "bf16 60", "autocast_list 4", "reason of auto", "2.50x", "3.5 s",
    ]  # fmt: skip
    assert [fact for fact in shown if fact not in out] == []


def test_options_reach_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def run_demo(**kwargs: Any) -> DemoResult:
        seen.update(kwargs)
        return RESULT

    monkeypatch.setattr(demo_command, "run_demo", run_demo)
    assert main(["demo", "--task", "text", "--quick", "--device", "cpu", "--seed", "3", "--json"]) == 0
    assert seen == {"only": "text", "quick": True, "device": "cpu", "seed": 3}
    assert json.loads(capsys.readouterr().out)["tasks"][0]["speedup"] == 2.5


def test_the_quick_demo_trains_both_tasks_and_prints_nothing_but_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", "off")
    out = StringIO()
    with redirect_stdout(out):
        assert main(["demo", "--quick", "--device", "cpu", "--json"]) == 0
    result = json.loads(out.getvalue())
    assert [task["title"] for task in result["tasks"]] == [
        "ResNet on handwritten digits", "GPT on the text of Python's library",
    ]  # fmt: skip
    for task in result["tasks"]:
        full, auto = task["runs"]
        assert (full["mode"], auto["mode"]) == ("fp32", "auto")
        assert full["format"] == "fp32"
        # The same weights and batches: the first losses differ by rounding alone.
        assert auto["first_loss"] == pytest.approx(full["first_loss"], rel=0.01)
        for one in (full, auto):
            assert one["last_loss"] < one["first_loss"]
            assert math.isfinite(one["validation_loss"])
            assert 0 < one["validation_accuracy"] <= 1
            assert one["step_ms"] > 0
            assert one["peak_memory_mib"] > 0
            assert one["operations"][one["format"]] > 0
        assert "ms" in auto["reason"]


def test_a_missing_scikit_learn_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "--quick", "--task", "digits", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'deepseek-mp[demo]'" in err
    assert err.count("\n") == 1
