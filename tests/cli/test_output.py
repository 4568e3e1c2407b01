"""JSON output is one document that any reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from deepseek_mp.cli.output import check_writable, print_json, print_record
from deepseek_mp.errors import ConfigError


def test_what_is_printed_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"a": [1, 2.5, None], "b": {"c": "text [bold]"}}
    print_json(data)
    assert json.loads(capsys.readouterr().out) == data


def test_a_number_that_json_lacks_is_not_printed() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"loss": math.nan})


def test_a_record_has_words_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_record({"loss": math.nan, "where": Path("runs")})
    assert json.loads(capsys.readouterr().out) == {"loss": "NaN", "where": "runs"}


def test_a_file_can_be_written_where_there_is_a_directory(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json", "--out")
    with pytest.raises(ConfigError, match=r"--out .*, a directory\. Allowed: a file in a directory that exists"):
        check_writable(tmp_path, "--out")
    with pytest.raises(ConfigError, match=r"--plan .*, in a directory that is not there"):
        check_writable(tmp_path / "nowhere" / "new.json", "--plan")
