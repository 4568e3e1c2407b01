"""What is decided while a model trains, on standard error as it happens."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deepseek_mp.trainer.recording import decided


class _Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # Looked up each time: a progress bar puts itself in place of standard error while it is shown.
        print(f"deepseek-mp: {record.getMessage()}", file=sys.stderr)


@contextmanager
def told() -> Iterator[None]:
    """Inside, each decision is a line."""
    handler, level = _Told(), decided.level
    decided.addHandler(handler)
    decided.setLevel(logging.INFO)
    try:
        yield
    finally:
        decided.removeHandler(handler)
        decided.setLevel(level)
