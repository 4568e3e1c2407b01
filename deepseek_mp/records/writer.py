"""RunWriter: appends what a run does to its directory, one line at a time, so that a kill loses none.

Each line is one write to a file opened for appending: it is with the operating system before the
call returns, whatever happens to this process. A line cut short (a full disk, a loss of power) is
closed off before the next one is written, so it costs that line and no other.

A run that is resumed in the same directory is a new *attempt*. Earlier lines stay; every line
carries the number of the attempt that wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.records.durable import replace_text
from deepseek_mp.records.lines import encode, to_plain
from deepseek_mp.records.runfile import (
    CHECKPOINTS,
    DECISIONS_FILE,
    METRICS_FILE,
    PLAN_FILE,
    RUN_FILE,
    Attempt,
    load_attempts,
    save_attempts,
)


class HasJson(Protocol):
    """Anything that can render itself as JSON values, such as a `Decision` or a `PrecisionPlan`."""

    def to_json(self) -> dict[str, Any]: ...


class RunWriter:
    """Writes the record of one run.

    path:        the run directory; created with its parents if need be.
    info:        what is fixed for this attempt: versions, device, configuration.
    resume_step: the step that was done last when this attempt starts. 0 is a fresh start; at k > 0,
                 lines of earlier attempts for steps after k are read as superseded.

    `ConfigError` if the path is not a directory, holds a record that this release cannot read, or a
    value is not one that a record can hold; nothing is written then. So is a directory that cannot be made
    or written to. A disk that is full later on is an `OSError`.
    """

    def __init__(self, path: str | os.PathLike[str], *, info: Mapping[str, Any], resume_step: int = 0) -> None:
        self.path = Path(path)
        attempt_info = to_plain(info, "info")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                explain(f"{self.path} is not a directory", "a run directory or a new path", "Choose another run_dir")
            )
        self._attempts = load_attempts(self.path) if (self.path / RUN_FILE).exists() else []
        self.attempt: int = len(self._attempts) + 1
        self._attempts.append(
            Attempt(
                attempt=self.attempt,
                resume_step=resume_step,
                started=_now(),
                ended=None,
                outcome=None,
                info=attempt_info,
            )
        )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_attempts(self.path, self._attempts)
            self._metrics = LineFile(self.path / METRICS_FILE)
            self._decisions = LineFile(self.path / DECISIONS_FILE)
        except OSError as error:
            passed = f"run directory {self.path} cannot be written ({error.strerror or type(error).__name__})"
            raise ConfigError(
                explain(passed, "one that this process may write to", "Choose another run_dir")
            ) from error

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of this run go; the directory may not exist yet."""
        return self.path / CHECKPOINTS

    def metrics(self, *, step: int, **fields: Any) -> None:
        """Append one line of measurements taken at `step`."""
        self._append(self._metrics, "metrics", step, fields)

    def decision(self, decision: HasJson | Mapping[str, Any], *, step: int | None = None) -> None:
        """Append one precision decision.

        `step` is the last step done when it was taken; without it, the decision's own "step", or 0.
        """
        fields = _fields(decision)
        self._append(self._decisions, "decision", fields.get("step", 0) if step is None else step, fields)

    def plan(self, plan: HasJson | Mapping[str, Any]) -> None:
        """Replace the plan in force, as a whole."""
        replace_text(self.path / PLAN_FILE, encode(_fields(plan), "plan", indent=1) + "\n")

    def close(self, outcome: str = "completed") -> None:
        """End the attempt and put everything on the disk; a second call does nothing."""
        if self._metrics.closed:
            return
        self._metrics.close()
        self._decisions.close()
        self._attempts[-1] = replace(self._attempts[-1], ended=_now(), outcome=outcome)
        save_attempts(self.path, self._attempts)

    def _append(self, file: LineFile, where: str, step: int, fields: Mapping[str, Any]) -> None:
        stamp = {"attempt": self.attempt, "step": step}
        file.append(encode(stamp | dict(fields) | stamp, where))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("completed" if kind is None else f"failed: {kind.__name__}")


class LineFile:
    """A file of lines opened for appending; one write a line, and no line runs into the next."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        self._torn = self._ends_inside_a_line()

    def append(self, line: str) -> None:
        """Write one line; `OSError` if the disk does not take it."""
        data = (b"\n" if self._torn else b"") + line.encode() + b"\n"
        self._torn = True
        while data:
            data = data[self._file.write(data) :]
        self._torn = False

    def close(self) -> None:
        """Put all lines on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def _ends_inside_a_line(self) -> bool:
        if self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"


def _fields(value: HasJson | Mapping[str, Any]) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else value.to_json()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
