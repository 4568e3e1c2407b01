"""What the user's own code raises while TARGET is found and called, as one line with its place in their file."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek_mp.errors import ConfigError, explain

OURS = Path(__file__).parent


@contextmanager
def explained(what: str, file: str | None) -> Iterator[None]:
    """Inside runs the user's code; what it raises becomes a `ConfigError` that begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        passed = f"{what} {traceback.format_exception_only(error)[-1].strip()}{_where(error, file)}"
        raise ConfigError(explain(passed, "code that runs and returns", "Correct it there")) from error


def _where(error: BaseException, file: str | None) -> str:
    """` (net.py line 7: model = Net())`: the last place in the user's file, else the last of all."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    own = [frame for frame in frames if frame.filename == file] or frames
    if isinstance(error, SyntaxError):
        return f" ({Path(error.filename or '').name} line {error.lineno})"
    return f" ({Path(own[-1].filename).name} line {own[-1].lineno}: {own[-1].line})" if own else ""


def _is_ours(file: str) -> bool:
    path = Path(file)
    return path.parent == OURS or path.name == "contextlib.py" or "importlib" in file
