"""Ctrl-C in two stages: the first asks the work to stop where it can be resumed, the second stops it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130
"""Exit status of a program that was interrupted."""


@contextmanager
def stopping(stop: Callable[[], None], notice: str) -> Iterator[None]:
    """Inside, the first interrupt prints `notice` and calls `stop`; a second one raises `KeyboardInterrupt`.

    Processes forked inside, such as the workers of a loader, pass interrupts over: who forked them ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can listen
        return
    owner, asked = os.getpid(), False

    def listen(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if os.getpid() != owner:
            return
        if asked:
            raise KeyboardInterrupt
        asked = True
        stop()
        with suppress(
            RuntimeError
        ):  # the interrupt came in the middle of a write; the notice is no more than a courtesy
            print(notice, file=sys.stderr)

    before = signal.signal(signal.SIGINT, listen)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
