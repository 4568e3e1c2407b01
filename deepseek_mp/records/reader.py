"""read_run: a run directory as plain values, for reports; tolerant of torn lines, strict about versions."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.records.lines import decode, from_plain
from deepseek_mp.records.runfile import DECISIONS_FILE, METRICS_FILE, PLAN_FILE, Attempt, load_attempts

logger = logging.getLogger(__name__)

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory says.

    `metrics` and `decisions` are the lines in force, in the order they were written. Lines that a
    later attempt replaced, because it resumed from before them, are in `superseded_metrics` and
    `superseded_decisions`. `torn_lines` counts lines that were cut short and are lost.
    """

    path: Path
    attempts: tuple[Attempt, ...]
    metrics: tuple[Line, ...]
    decisions: tuple[Line, ...]
    superseded_metrics: tuple[Line, ...]
    superseded_decisions: tuple[Line, ...]
    plan: dict[str, Any] | None
    torn_lines: int

    @property
    def info(self) -> dict[str, Any]:
        """The `info` of the latest attempt."""
        return self.attempts[-1].info


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run directory; `ConfigError` if it is not one, or is of another record version."""
    directory = Path(path)
    attempts = load_attempts(directory)
    if not attempts:
        raise ConfigError(explain(f"{path} has no attempt", "a run that was started", "Start the run again"))
    metrics, torn_metrics = _read_lines(directory / METRICS_FILE)
    decisions, torn_decisions = _read_lines(directory / DECISIONS_FILE)
    metrics_in_force, metrics_superseded = _split(metrics, attempts)
    decisions_in_force, decisions_superseded = _split(decisions, attempts)
    return Run(
        path=directory,
        attempts=tuple(attempts),
        metrics=metrics_in_force,
        decisions=decisions_in_force,
        superseded_metrics=metrics_superseded,
        superseded_decisions=decisions_superseded,
        plan=_read_plan(directory / PLAN_FILE),
        torn_lines=torn_metrics + torn_decisions,
    )


def _read_lines(file: Path) -> tuple[list[Line], int]:
    """All whole lines of a file, and how many were not."""
    if not file.exists():
        return [], 0
    lines: list[Line] = []
    torn = 0
    with file.open("rb") as data:
        for raw in data:
            fields = decode(raw)
            if fields is not None and isinstance(fields.get("attempt"), int) and isinstance(fields.get("step"), int):
                lines.append(fields)
            elif raw.strip():
                torn += 1
    if torn:
        logger.warning("%s: %d line(s) were cut short and are left out", file, torn)
    return lines, torn


def _split(lines: Sequence[Line], attempts: Sequence[Attempt]) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """The lines in force, and those that a later attempt superseded."""
    resumed = {
        a.attempt: min((b.resume_step for b in attempts if b.attempt > a.attempt), default=None) for a in attempts
    }

    def in_force(line: Line) -> bool:
        last = resumed.get(line["attempt"])
        return last is None or (last > 0 and line["step"] <= last)

    return tuple(line for line in lines if in_force(line)), tuple(line for line in lines if not in_force(line))


def _read_plan(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        plan = from_plain(json.loads(file.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            explain(f"{file} cannot be read ({error})", "a plan.json written by this package", "Restore the file")
        ) from error
    if not isinstance(plan, dict):
        raise ConfigError(explain(f"{file} holds no object", "a plan.json of this package", "Restore the file"))
    return plan
