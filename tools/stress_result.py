"""Writes the last result of the stress tests, from pytest's XML report, as a short text file.

`python tools/stress_result.py REPORT.xml RESULT.txt`. The result is kept in the repository, so that
the state of tests too long for every run can be seen without running them.
"""

from __future__ import annotations

import os
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def outcome(case: ElementTree.Element) -> str:
    """passed, failed, error or skipped: pytest adds a child element for all but the first."""
    words = {"failure": "failed", "error": "error", "skipped": "skipped"}
    return next((words[child.tag] for child in case if child.tag in words), "passed")


def torch_version() -> str:
    """The installed torch, read without importing it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "not installed"


def describe(report: str) -> str:
    """The result file's text: when and where, a line per test, the total."""
    suite = next(ElementTree.fromstring(report).iter("testsuite"))
    cases = list(suite.iter("testcase"))
    outcomes = [outcome(case) for case in cases]
    failed = outcomes.count("failed") + outcomes.count("error")
    lines = [
        f"make stress, {suite.get('timestamp', '')[:10]}",
        f"Python {platform.python_version()}, torch {torch_version()}, {platform.machine()}, {os.cpu_count()} cores",
        "",
    ]
    for case, result in zip(cases, outcomes, strict=True):
        lines.append(f"{result:8} {float(case.get('time', 0)):7.1f} s  {case.get('classname')}.{case.get('name')}")
    total = f"{outcomes.count('passed')} passed, {failed} failed, {outcomes.count('skipped')} skipped"
    return "\n".join([*lines, "", f"total: {total}", ""])


def main(arguments: Sequence[str]) -> int:
    """Convert the report; 2 if it is not there."""
    if len(arguments) != 2 or not Path(arguments[0]).is_file():
        print(
            f"stress_result.py got {' '.join(arguments)!r}. Allowed: REPORT.xml (a file) RESULT.txt.", file=sys.stderr
        )
        return 2
    report, result = map(Path, arguments)
    result.write_text(describe(report.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
