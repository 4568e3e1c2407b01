from __future__ import annotations

from pathlib import Path

import pytest

import stress_result

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" tests="4" timestamp="2030-02-03T04:05:06.7" time="12.5">
<testcase classname="tests.faults.test_kill" name="test_kill_loop" time="95.25" />
<testcase classname="tests.faults.test_kill" name="test_flip" time="1.0"><failure message="m">text</failure></testcase>
<testcase classname="tests.faults.test_kill" name="test_setup" time="0.5"><error message="m">text</error></testcase>
<testcase classname="tests.faults.test_kill" name="test_disk" time="0.0"><skipped message="m" /></testcase>
</testsuite></testsuites>"""


def test_result_has_a_line_per_test_and_the_total() -> None:
    lines = stress_result.describe(REPORT).splitlines()
    assert lines[0] == "make stress, 2030-02-03"
    assert "torch" in lines[1]
    assert [line.split() for line in lines[3:7]] == [
        ["passed", "95.2", "s", "tests.faults.test_kill.test_kill_loop"],
        ["failed", "1.0", "s", "tests.faults.test_kill.test_flip"],
        ["error", "0.5", "s", "tests.faults.test_kill.test_setup"],
        ["skipped", "0.0", "s", "tests.faults.test_kill.test_disk"],
    ]
    assert lines[-1] == "total: 1 passed, 2 failed, 1 skipped"


def test_main_writes_the_file(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert stress_result.main([str(tmp_path / "report.xml"), str(tmp_path / "result.txt")]) == 0
    assert (tmp_path / "result.txt").read_text() == stress_result.describe(REPORT)


def test_missing_report_leaves_the_last_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.txt").write_text("last")
    assert stress_result.main([str(tmp_path / "none.xml"), str(tmp_path / "result.txt")]) == 2
    assert "Allowed: REPORT.xml (a file) RESULT.txt" in capsys.readouterr().err
    assert (tmp_path / "result.txt").read_text() == "last"
