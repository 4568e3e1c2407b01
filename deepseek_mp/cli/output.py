"""How results leave the program."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.records.lines import to_plain
from deepseek_mp.report.curve import BLOCKS

PIPE_WIDTH = 120
"""Characters a line, where nothing says how wide the terminal is."""


def print_json(data: Any) -> None:
    """Print one JSON document on standard output; numbers that JSON lacks (NaN) are a defect and raise."""
    print(json.dumps(data, indent=1, allow_nan=False))


def print_record(data: Any) -> None:
    """Print JSON in which numbers that are not finite are words, as in a record."""
    print_json(to_plain(data, "output"))


def print_text(text: str) -> None:
    """Print text with what the terminal can show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


def terminal_width() -> int:
    """Characters a line; `COLUMNS` overrides it."""
    return shutil.get_terminal_size((PIPE_WIDTH, 24)).columns


def is_ascii() -> bool:
    """Whether standard output has no blocks to draw a curve with."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return True
    return False


def check_writable(path: Path, option: str) -> None:
    """`ConfigError` if no file can be written there, before work is done that it would lose."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        passed = f"{option} {path}, {'a directory' if path.is_dir() else 'in a directory that is not there'}"
        raise ConfigError(explain(passed, "a file in a directory that exists", "Choose another path"))
