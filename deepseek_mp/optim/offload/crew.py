"""`Crew`: threads of one core each that share out the host's work, block by block.

PyTorch's own threads take equal parts of one operation and meet at its end, so that one of them that has to wait for a
core (beside backward, another thread's pool, other processes) lets all wait, in every operation on every block. Threads
that each take the next block when they are done with theirs meet once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

Task = Callable[[], None]


class Job:
    """Tasks that are worked on; `end` waits for them."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._next: Iterator[Task] = iter(tasks)
        self._one = threading.Lock()
        self._hands: list[Future[None]] = []

    def share(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """Let so many threads begin."""
        for _ in range(threads):
            self._hands.append(pool.submit(self.work))

    @torch.no_grad()
    def work(self) -> None:
        """Take one task after the other; after one that fails none is begun."""
        while (task := self._take()) is not None:
            try:
                task()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Begin no more tasks."""
        with self._one:
            self._next = iter(())

    def end(self) -> None:
        """Wait for all tasks; raises what the first one that failed has raised, when no other is at work any more.

        Whoever is interrupted here finds that nobody is at work, too.
        """
        try:
            wait(self._hands)
        except BaseException:
            self.stop()
            wait(self._hands)
            raise
        for hand in self._hands:
            hand.result()

    def _take(self) -> Task | None:
        with self._one:
            return next(self._next, None)


class Crew:
    """Threads that start with the first job and end with the crew.

    Args:
        threads: so many; None: as many as PyTorch takes for an operation, which are the cores that it may run on unless
            somebody has said otherwise.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._starting = threading.Lock()

    def begin(self, tasks: Sequence[Task]) -> Job:
        """Work on tasks that need no order, behind those of jobs that were begun before; without gradients.

        With one thread, or for one task, that is done by the caller before this returns.
        """
        job = Job(tasks)
        if self.threads == 1 or len(tasks) < 2:
            job.work()
        else:
            job.share(self._started(), min(self.threads, len(tasks)))
        return job

    def run(self, tasks: Sequence[Task]) -> None:
        """Begin, and wait for the end."""
        self.begin(tasks).end()

    def _started(self) -> ThreadPoolExecutor:
        with self._starting:
            if self._pool is None:
                self._pool = _pool(self.threads)
            return self._pool


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run operations on one core.

    The number that a thread sets is its own, and that of threads which PyTorch meets later: so it is set back here.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="offload-crew")
    mine, all_are_there = torch.get_num_threads(), threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(_take_one_core, all_are_there)
    all_are_there.wait()
    torch.set_num_threads(mine)
    return pool


def _take_one_core(all_are_there: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first question sets the number of others
    torch.set_num_threads(1)
    all_are_there.wait()
