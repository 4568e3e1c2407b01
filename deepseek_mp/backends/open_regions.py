"""Regions that set what belongs to the whole process, such as PyTorch's FP32 flags, where threads open them too.

Each alone would read what was there when it began and write that at its end. Of two that overlap the second reads what
the first has set, and if it ends last leaves that behind for good.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from threading import RLock, get_ident
from types import TracebackType


class _Setting:
    """What is set, and the threads that are in it."""

    __slots__ = ("key", "threads", "undo")

    def __init__(self, key: Hashable, undo: AbstractContextManager[object]) -> None:
        self.key, self.undo, self.threads = key, undo, {get_ident()}


class OpenRegions:
    """The regions of one kind that are open now, the innermost last."""

    def __init__(self) -> None:
        # Entered again by its own thread: a generator that is collected, or a signal's handler, may end a region here.
        self._lock = RLock()
        self._open: list[_Setting] = []

    def region(
        self, key: Hashable, setting: Callable[[], AbstractContextManager[object]]
    ) -> AbstractContextManager[None]:
        """A region in which `setting` is in force.

        A thread shares the innermost one of another thread where the keys are equal. Where they are not, what was set
        last holds for all threads. What was there before the first is put back when the last one is left.

        Args:
            key: says what is set; equal ones set the same.
            setting: makes a region that sets it, and puts back at its end what it found.
        """
        return _Region(self, key, setting)

    def enter(self, key: Hashable, setting: Callable[[], AbstractContextManager[object]]) -> _Setting:
        """Begin a region of this thread; what `setting` raises is raised."""
        with self._lock:
            last = self._open[-1] if self._open else None
            # One inside another of the same thread is set anew: the code between them may have changed it.
            if last is not None and last.key == key and get_ident() not in last.threads:
                last.threads.add(get_ident())
                return last
            entered = _Setting(key, setting())
            self._open.append(entered)  # before it is set, so that none below is undone over it
            try:
                entered.undo.__enter__()
            except BaseException:
                self._open.remove(entered)
                raise
            return entered

    def leave(self, entered: _Setting, thread: int) -> None:
        """End the region that a thread began. Those below others are undone after these."""
        with self._lock:
            entered.threads.remove(thread)
            while self._open and not self._open[-1].threads:
                self._open.pop().undo.__exit__(None, None, None)


class _Region(AbstractContextManager[None]):
    """Of one thread, once."""

    def __init__(
        self, regions: OpenRegions, key: Hashable, setting: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._regions, self._key, self._setting = regions, key, setting

    def __enter__(self) -> None:
        self._thread = get_ident()
        self._entered = self._regions.enter(self._key, self._setting)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._regions.leave(self._entered, self._thread)
