"""run.json: round trip, versions, and files that are not ours."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.records.runfile import RUN_FILE, Attempt, load_attempts, save_attempts

FIRST = Attempt(
    attempt=1, resume_step=0, started="2026-01-01T00:00:00+00:00", ended=None, outcome=None, info={"seed": math.nan}
)


def test_attempts_survive_the_file_non_finite_numbers_too(tmp_path: Path) -> None:
    second = replace(FIRST, attempt=2, resume_step=7, ended="2026-01-02T00:00:00+00:00", outcome="completed", info={})
    save_attempts(tmp_path, [FIRST, second])
    first, again = load_attempts(tmp_path)
    assert again == second
    assert math.isnan(first.info["seed"])
    json.loads((tmp_path / RUN_FILE).read_text(), parse_constant=pytest.fail)  # strict JSON


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"format": "another"}, {"version": None}, {"attempts": [{"attempt": 1}]}, {"attempts": 3}],
)
def test_a_file_of_another_kind_or_version_is_one_clear_error(tmp_path: Path, change: dict[str, object]) -> None:
    save_attempts(tmp_path, [FIRST])
    content = json.loads((tmp_path / RUN_FILE).read_text())
    (tmp_path / RUN_FILE).write_text(json.dumps(content | change))
    with pytest.raises(ConfigError, match=r"run\.json (cannot be read|is of record version)"):
        load_attempts(tmp_path)


@pytest.mark.parametrize(
    "change", [{"resume_step": "7"}, {"attempt": True}, {"info": None}, {"ended": 3}, {"outcome": ["completed"]}]
)
def test_an_attempt_with_a_value_of_another_type_is_one_clear_error(tmp_path: Path, change: dict[str, object]) -> None:
    save_attempts(tmp_path, [replace(FIRST, **change)])
    with pytest.raises(ConfigError, match=r"run\.json cannot be read \(TypeError: attempt"):
        load_attempts(tmp_path)


def test_a_missing_or_torn_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run\.json"):
        load_attempts(tmp_path)
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_attempts(tmp_path)
