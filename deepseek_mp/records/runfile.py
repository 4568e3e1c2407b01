"""run.json: what a run is, which attempts it had, and the version of the record around it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.records.durable import replace_text
from deepseek_mp.records.lines import encode, from_plain

RECORD_VERSION = 1
RECORD_FORMAT = "deepseek_mp run"

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
DECISIONS_FILE = "decisions.jsonl"
PLAN_FILE = "plan.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One process's part of a run: from a fresh start, or from a checkpoint on.

    `resume_step` is the step that was done last when it started, 0 for a fresh start. `ended` and
    `outcome` are None for an attempt that is still running, or was killed. Times are ISO 8601, UTC.
    `outcome` is "completed", or "failed: " and the exception's class.
    """

    attempt: int
    resume_step: int
    started: str
    ended: str | None
    outcome: str | None
    info: dict[str, Any]


def load_attempts(path: Path) -> list[Attempt]:
    """The attempts in the run.json of a run directory; `ConfigError` if this release cannot read it."""
    file = path / RUN_FILE
    if not file.is_file():
        raise ConfigError(
            explain(f"{path} holds no {RUN_FILE}", "the directory of a run", "Check the path of the run directory")
        )
    try:
        run = json.loads(file.read_bytes())
        version = int(run["version"]) if run["format"] == RECORD_FORMAT else 0
        attempts = list(map(_attempt, run["attempts"])) if version == RECORD_VERSION else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            explain(
                f"{file} cannot be read ({type(error).__name__}: {error})",
                "a run.json written by this package",
                "Restore it, or use another run_dir; the lines in the .jsonl files are not affected",
            )
        ) from error
    if version != RECORD_VERSION:
        raise ConfigError(
            explain(
                f"{file} is of record version {run['version']!r}, format {run['format']!r}",
                f"version {RECORD_VERSION} of {RECORD_FORMAT!r}",
                "Read it with the release of deepseek-mp that wrote it, or use another run_dir",
            )
        )
    return attempts


def _attempt(entry: Any) -> Attempt:
    """An attempt as `save_attempts` wrote it; `TypeError` for values of other types."""
    attempt = Attempt(**from_plain(entry))
    numbers, texts = (attempt.attempt, attempt.resume_step), (attempt.started, attempt.ended, attempt.outcome)
    if any(type(number) is not int for number in numbers) or not isinstance(attempt.info, dict):
        raise TypeError(f"attempt {attempt.attempt!r} has a number or an info of another type")
    if any(text is not None and not isinstance(text, str) for text in texts):
        raise TypeError(f"attempt {attempt.attempt!r} has a time or an outcome that is no text")
    return attempt


def save_attempts(path: Path, attempts: list[Attempt]) -> None:
    """Write the run.json of a run directory, as a whole."""
    run = {"format": RECORD_FORMAT, "version": RECORD_VERSION, "attempts": [vars(attempt) for attempt in attempts]}
    replace_text(path / RUN_FILE, encode(run, "run", indent=1) + "\n")
