"""Reading gives the lines in force, keeps the others apart, and is strict about versions only."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.records import Run, RunWriter, read_run


def record(path: Path, steps: range, resume_step: int = 0, decisions: tuple[int, ...] = ()) -> None:
    with RunWriter(path, info={"resumed": resume_step}, resume_step=resume_step) as writer:
        for step in decisions:
            writer.decision({"layer": "a"}, step=step)
        for step in steps:
            writer.metrics(step=step, loss=float(step))


def where(lines: tuple[dict[str, int], ...]) -> list[tuple[int, int]]:
    return [(line["attempt"], line["step"]) for line in lines]


def test_a_run_comes_back(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={"limit": math.inf}) as writer:
        writer.plan({"base": "bf16"})
        writer.decision({"layer": "fc", "evidence": {"ms": math.nan}}, step=0)
        writer.metrics(step=1, loss=math.nan)
    run = read_run(tmp_path)
    assert run.path == tmp_path
    assert run.info == {"limit": math.inf}
    assert run.plan == {"base": "bf16"}
    assert where(run.metrics) == [(1, 1)]
    assert math.isnan(run.metrics[0]["loss"])
    assert math.isnan(run.decisions[0]["evidence"]["ms"])
    assert run.attempts[0].outcome == "completed"
    assert run.torn_lines == 0


def test_lines_after_the_step_that_was_resumed_are_superseded(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6), decisions=(0, 4))
    record(tmp_path, range(4, 7), resume_step=3)
    run = read_run(tmp_path)
    assert where(run.metrics) == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert where(run.superseded_metrics) == [(1, 4), (1, 5)]
    assert where(run.decisions) == [(1, 0)]
    assert where(run.superseded_decisions) == [(1, 4)]
    assert run.info == {"resumed": 3}


def test_a_later_attempt_may_go_back_further(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6))
    record(tmp_path, range(5, 9), resume_step=4)
    record(tmp_path, range(3, 5), resume_step=2)
    assert where(read_run(tmp_path).metrics) == [(1, 1), (1, 2), (3, 3), (3, 4)]


def test_a_fresh_start_supersedes_all(tmp_path: Path) -> None:
    record(tmp_path, range(3), decisions=(0,))
    record(tmp_path, range(2), decisions=(0,))
    run = read_run(tmp_path)
    assert where(run.metrics) == [(2, 0), (2, 1)]
    assert where(run.decisions) == [(2, 0)]
    assert len(run.superseded_metrics) == 3


def test_a_run_resumed_in_a_new_directory(tmp_path: Path) -> None:
    record(tmp_path, range(8, 10), resume_step=7)
    assert where(read_run(tmp_path).metrics) == [(1, 8), (1, 9)]


@pytest.mark.parametrize("tail", [b'{"attempt": 1, "step": 3, "lo', b"\0" * 100, b"\xff\xfe", b'{"loss": 1}', b"7"])
def test_a_torn_last_line_is_left_out_and_counted(
    tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    run = read_run(tmp_path)
    assert where(run.metrics) == [(1, 1), (1, 2)]
    assert run.torn_lines == 1
    assert "metrics.jsonl: 1 line(s) were cut short" in caplog.text
    record(tmp_path, range(3, 4), resume_step=2)
    assert where(read_run(tmp_path).metrics) == [(1, 1), (1, 2), (2, 3)]


def test_a_run_that_is_still_going_or_was_killed_can_be_read(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, info={})
    writer.metrics(step=1)
    run = read_run(tmp_path)
    assert (run.plan, run.decisions, run.attempts[0].ended) == (None, (), None)
    writer.close()


def test_files_that_are_not_there_are_empty(tmp_path: Path) -> None:
    record(tmp_path, range(2))
    (tmp_path / "metrics.jsonl").unlink()
    assert isinstance(read_run(tmp_path), Run)
    assert read_run(tmp_path).metrics == ()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", '{"format": "deepseek_mp run", "version": 2}', r"record version 2.*release of deepseek-mp that"),
        ("run.json", '{"format": "deepseek_mp run", "version": 1, "attempts": []}', "has no attempt"),
        ("run.json", "{", r"run\.json cannot be read"),
        ("plan.json", "{", r"plan\.json cannot be read"),
        ("plan.json", "[]", r"plan\.json holds no object"),
    ],
)
def test_a_record_it_cannot_read_is_one_clear_error(tmp_path: Path, file: str, text: str, message: str) -> None:
    record(tmp_path, range(2))
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path)


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run\.json"):
        read_run(tmp_path)
