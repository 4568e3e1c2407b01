"""JSON output is one document that any reader takes."""

from __future__ import annotations

import json
import math

import pytest

from deepseek_mp.cli.output import print_json


def test_what_is_printed_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"a": [1, 2.5, None], "b": {"c": "text [bold]"}}
    print_json(data)
    assert json.loads(capsys.readouterr().out) == data


def test_a_number_that_json_lacks_is_not_printed() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"loss": math.nan})
