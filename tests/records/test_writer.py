"""The writer loses no line to a kill, and a resumed run adds to what is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.records import RECORD_VERSION, RunWriter
from deepseek_mp.records.writer import LineFile

DECISION = Decision(layer="fc", old="fp32", new="bf16", reason=Reason.MEASURED_FASTEST, evidence={"bf16_ms": 1.5})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_directory_is_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    with RunWriter(path, info={"device": "cpu", "versions": {"torch": "2.13"}}) as writer:
        writer.plan(PrecisionPlan.of("bf16"))
        writer.decision(DECISION, step=0)
        writer.metrics(step=1, loss=0.5)
    assert sorted(os.listdir(path)) == ["decisions.jsonl", "metrics.jsonl", "plan.json", "run.json"]
    run = json.loads((path / "run.json").read_text())
    assert (run["format"], run["version"]) == ("deepseek_mp run", RECORD_VERSION)
    assert run["attempts"][0]["info"] == {"device": "cpu", "versions": {"torch": "2.13"}}
    assert run["attempts"][0]["outcome"] == "completed"
    assert lines(path / "metrics.jsonl") == [{"attempt": 1, "step": 1, "loss": 0.5}]
    assert lines(path / "decisions.jsonl") == [{"attempt": 1, "step": 0, **DECISION.to_json()}]
    assert PrecisionPlan.load(path / "plan.json") == PrecisionPlan.of("bf16")
    assert writer.checkpoints == path / "checkpoints"


def test_decisions_may_bring_their_own_step(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={}) as writer:
        writer.decision({"step": 7, **DECISION.to_json()})
        writer.decision({"step": 7, "layer": "a"}, step=8)
        writer.decision({"layer": "b", "attempt": 99})
    found = lines(tmp_path / "decisions.jsonl")
    assert [(line["attempt"], line["step"]) for line in found] == [(1, 7), (1, 8), (1, 0)]


def test_a_nan_loss_is_in_the_file(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={}) as writer:
        writer.metrics(step=1, loss=float("nan"))
    assert '"loss": "NaN"' in (tmp_path / "metrics.jsonl").read_text()


def test_every_line_is_with_the_system_when_the_call_returns(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={}) as writer:
        for step in range(1, 4):
            writer.metrics(step=step)
            assert len(lines(tmp_path / "metrics.jsonl")) == step


CHILD = """
import os, signal, sys
from deepseek_mp.records import RunWriter
writer = RunWriter(sys.argv[1], info={})
for step in range(1, 501):
    writer.metrics(step=step, text="x" * 300)
    writer.decision({"layer": "a"}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_kill_loses_no_line_that_was_written(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    for name in ("metrics.jsonl", "decisions.jsonl"):
        assert [line["step"] for line in lines(tmp_path / name)] == list(range(1, 501))
    attempt = json.loads((tmp_path / "run.json").read_text())["attempts"][0]
    assert (attempt["ended"], attempt["outcome"]) == (None, None)


def test_a_resumed_run_adds_to_the_lines_and_to_the_attempts(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={"n": 1}) as writer:
        for step in (1, 2, 3):
            writer.metrics(step=step)
    with RunWriter(tmp_path, info={"n": 2}, resume_step=2) as writer:
        writer.metrics(step=3)
    assert [(line["attempt"], line["step"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 3),
    ]
    attempts = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert [(a["attempt"], a["resume_step"], a["info"]) for a in attempts] == [(1, 0, {"n": 1}), (2, 2, {"n": 2})]


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={}) as writer:
        writer.metrics(step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 1, "st')
    with RunWriter(tmp_path, info={}, resume_step=1) as writer:
        writer.metrics(step=2)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text[0])["step"], json.loads(text[2])["step"]] == [1, 2]
    assert text[1] == '{"attempt": 1, "st'


class HalfFullDisk:
    """A file that takes a few bytes of a line, then reports a full disk, then works again."""

    def __init__(self, file: Any, takes: list[int]) -> None:
        self.file, self.takes = file, takes

    def write(self, data: bytes) -> int:
        if self.takes and self.takes[0] == 0:
            self.takes.pop(0)
            raise OSError(28, "No space left on device")
        return int(self.file.write(data[: self.takes.pop(0)] if self.takes else data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_line_cut_by_a_full_disk_does_not_spoil_the_next(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "x")
    file.append("one")
    file._file = HalfFullDisk(file._file, [2, 0])  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        file.append("two")
    file.append("three")
    file.append("four")
    file.close()
    assert (tmp_path / "x").read_text() == "one\ntw\nthree\nfour\n"


def test_a_line_taken_in_parts_is_whole(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "x")
    file._file = HalfFullDisk(file._file, [1, 2])  # type: ignore[assignment]
    file.append("abcdef")
    file.close()
    assert (tmp_path / "x").read_text() == "abcdef\n"


def test_the_outcome_of_an_attempt(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), RunWriter(tmp_path, info={}):
        raise RuntimeError("boom")
    writer = RunWriter(tmp_path, info={})
    writer.close()
    writer.close("again")
    attempts = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["failed: RuntimeError", "completed"]
    assert all(attempt["started"] <= attempt["ended"] for attempt in attempts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "deepseek_mp run", "version": 2, "attempts": []}', r"record version 2.*version 1 of"),
        ('{"format": "other", "version": 1, "attempts": []}', "format 'other'"),
        ("", r"run\.json cannot be read"),
        ("[]", r"run\.json cannot be read"),
        ('{"format": "deepseek_mp run", "version": 1, "attempts": [{"x": 1}]}', r"run\.json cannot be read"),
    ],
)
def test_a_record_it_cannot_read_is_refused_and_left_alone(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunWriter(tmp_path, info={})
    assert os.listdir(tmp_path) == ["run.json"]
    assert (tmp_path / "run.json").read_text() == text


def test_bad_arguments_leave_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"info\.hook is a builtin_function"):
        RunWriter(tmp_path / "run", info={"hook": print})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is not a directory"):
        RunWriter(tmp_path / "file", info={})
    assert os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run directory .*run cannot be written \(Not a directory\)\. Allowed: one"):
        RunWriter(tmp_path / "file" / "run", info={})


def test_a_value_that_cannot_be_recorded_writes_no_part_of_a_line(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={}) as writer:
        with pytest.raises(ConfigError, match=r"metrics\.f is a builtin"):
            writer.metrics(step=1, loss=1.0, f=print)
        writer.metrics(step=1, loss=1.0)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
