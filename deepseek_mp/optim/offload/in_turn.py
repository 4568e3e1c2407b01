"""The host's work on one chunk after the other: the next one is begun before the one in front of it is waited for.

So no thread of the crew waits while a chunk that is done is looked after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from deepseek_mp.optim.offload.crew import Crew, Job

AHEAD = 1
"""Chunks that are begun ahead."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class UnderWay:
    """Work of a crew, and what there is to do after it."""

    job: Job
    _done: Callable[[], None]

    def end(self) -> None:
        """Wait until it is made; raises what it has raised."""
        self.job.end()
        self._done()

    def cancel(self) -> None:
        """Wait until nobody is at work on it; it may be made in part then."""
        self.job.cancel()


def in_turn(
    items: Iterable[Item],
    begin: Callable[[Item], UnderWay | None],
    finish: Callable[[Item], None],
    crew: Crew,
) -> None:
    """Begin and end the work on all items, in their order; after a failure nobody is at work on any.

    Args:
        items: chunks.
        begin: the work on one; None if that is done already.
        finish: what is done with one whose work has ended.
        crew: that does the work. One of a single thread works in `begin`, so that nothing is gained ahead.
    """
    ahead = AHEAD if crew.threads > 1 else 0
    under_way: deque[tuple[Item, UnderWay | None]] = deque()

    def end() -> None:
        item, work = under_way.popleft()
        if work is not None:
            work.end()
        finish(item)

    try:
        for item in items:
            under_way.append((item, begin(item)))
            if len(under_way) > ahead:
                end()
        while under_way:
            end()
    except BaseException:
        for _, work in under_way:
            if work is not None:
                work.cancel()
        raise
