"""Whatever is wrong with a run directory is one error that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.report.load import open_run


def test_a_run_is_opened(record: Callable[..., Path]) -> None:
    assert len(open_run(str(record())).metrics) == 3


def test_a_file_that_cannot_be_opened(record: Callable[..., Path]) -> None:
    path = record()
    (path / "metrics.jsonl").unlink()
    (path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read .*Check the path and its permissions"):
        open_run(path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run\.json"):
        open_run(tmp_path / "nowhere")
