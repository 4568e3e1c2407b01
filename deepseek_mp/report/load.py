"""Opens a run directory for a report: whatever is wrong with it is one `ConfigError`."""

from __future__ import annotations

import os

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.records import Run, read_run


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run at `path`; `ConfigError` if it is none, is of another record version, or cannot be opened."""
    try:
        return read_run(path)
    except OSError as error:
        allowed, change = "files that can be read", "Check the path and its permissions"
        raise ConfigError(explain(f"{path} cannot be read ({error})", allowed, change)) from error
