"""`report` prints what the functions of `deepseek_mp.report` return, and ends in one line where it cannot."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest

from deepseek_mp.cli.app import main
from deepseek_mp.records import RunWriter
from deepseek_mp.report import compare_runs, render_difference, render_report, report_run


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    paths = []
    for name, last in (("a", 1.0), ("b", math.nan)):
        with RunWriter(tmp_path / name, info={"config": {"seed": 0}}) as writer:
            for step, loss in enumerate((3.0, 2.0, last), 1):
                writer.metrics(step=step, status="applied", loss=loss)
        paths.append(str(tmp_path / name))
    return paths


@pytest.mark.parametrize("width", [60, 150])
def test_text_is_as_wide_as_the_terminal(
    runs: list[str], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["report", runs[0]]) == 0
    assert main(["report", "--diff", *runs]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out == f"{render_report(report_run(runs[0]), width)}\n{render_difference(compare_runs(*runs), width)}\n"


def test_json_is_strict_and_alone(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", runs[1], "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["loss"]["curve"] == [[1, 3.0], [2, 2.0], [3, "NaN"]]
    assert main(["report", "--diff", *runs, "--tolerance", "0.5", "--json"]) == 0
    difference = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (difference["tolerance"], difference["loss"]["first_beyond"]["step"]) == (0.5, 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["report"], "Missing argument"),
        (["report", "nowhere"], "nowhere holds no run.json"),
        (["report", "--diff", "a"], "1 run directories with --diff"),
        (["report", "a", "b"], "2 run directories without --diff"),
        (["report", "a", "--tolerance", "much"], "Invalid value for '--tolerance'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("run.json", "{", "cannot be read"),
        ("run.json", '{"format": "deepseek_mp run", "version": 2}', "record version 2"),
        ("run.json", '{"format": "deepseek_mp run", "version": 1, "attempts": []}', "has no attempt"),
        ("plan.json", "[]", "holds no object"),
    ],
)
def test_a_damaged_record_is_one_line_and_status_2(
    runs: list[str], file: str, text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(runs[0], file).write_text(text)
    for arguments in (["report", runs[0]], ["report", "--diff", *runs], ["report", "--diff", *reversed(runs)]):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert expected in err


def test_a_terminal_without_blocks(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert main(["report", runs[1]]) == 0
    assert b"  #_!\n" in raw.getvalue()
