"""`Crew`: teams of threads that share out the host's work, block by block.

PyTorch's own threads take equal parts of one operation and meet at its end, so that one of them that has to wait for a
core (beside backward, another thread's pool, other processes) lets all wait, in every operation on every block. Teams
that each take the next block when they are done with theirs meet once. On a few cores a team is a single thread. On
many it has several, which share an operation: what Python does between operations is done by one team at a time, and
with a team for each core the teams would wait for each other there.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

Task = Callable[[], object]


class Job:
    """Tasks that need no order; after one that fails none is begun."""

    def __init__(self, tasks: Iterable[Task], board: Board) -> None:
        self.left = deque(tasks)
        self.running = 0
        self.error: BaseException | None = None
        self._board = board

    @property
    def is_over(self) -> bool:
        """Whether nobody is at work and nobody will be."""
        return not self.left and not self.running

    def end(self) -> None:
        """Wait for all tasks; raises what the first one that failed has raised, when nobody is at work any more.

        Whoever is interrupted here finds nobody at work, too.
        """
        try:
            self._board.wait(self)
        except BaseException:
            self.cancel()
            raise
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Begin no more tasks, and wait for those at work."""
        self._board.stop(self)
        self._board.wait(self)


class Board:
    """Where the threads of a crew find their next task."""

    def __init__(self) -> None:
        lock = threading.RLock()  # a crew may be collected, and closed, by whoever is in here
        self._new, self._over = threading.Condition(lock), threading.Condition(lock)
        self._jobs: deque[Job] = deque()
        self._beside: deque[Job] = deque()
        self._is_closed = False
        self.threads: list[threading.Thread] = []

    def add(self, job: Job, *, beside: bool) -> None:
        with self._new:
            (self._beside if beside else self._jobs).append(job)
            self._new.notify_all()

    def stop(self, job: Job) -> None:
        with self._new:
            job.left.clear()

    def wait(self, job: Job) -> None:
        with self._over:
            while not job.is_over:
                self._over.wait()

    def close(self) -> None:
        """Threads end when they are done with their tasks."""
        with self._new:
            self._is_closed = True
            for job in self._beside:
                job.left.clear()
            self._new.notify_all()

    def work(self) -> None:
        """Take one task after the other, until the crew is no more."""
        while (found := self._next()) is not None:
            job, task = found
            error: BaseException | None = None
            try:
                task()
            except BaseException as raised:  # noqa: BLE001 - whoever waits for the job raises it
                error = raised
            self._done(job, error)
            del found, job, task, error  # else a thread without work would keep what they refer to

    def _next(self) -> tuple[Job, Task] | None:
        with self._new:
            while True:
                for jobs in (self._jobs, self._beside):
                    while jobs and not jobs[0].left:
                        jobs.popleft()
                    if jobs:
                        jobs[0].running += 1
                        return jobs[0], jobs[0].left.popleft()
                if self._is_closed:
                    return None
                self._new.wait()

    def _done(self, job: Job, error: BaseException | None) -> None:
        with self._over:
            job.running -= 1
            if error is not None:
                job.error = job.error or error
                job.left.clear()
            if job.is_over:
                self._over.notify_all()


_BOARDS: weakref.WeakSet[Board] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that comes back from an operation when Python has ended aborts the process."""
    for board in list(_BOARDS):
        board.close()
        for thread in board.threads:
            thread.join()


TEAMS = 4
"""So many, or one more where that leaves fewer threads over; below twice as many threads each is a team."""


class Crew:
    """Threads that start with the first job and end with the crew.

    Args:
        threads: so many; None: as many as PyTorch takes for an operation, which are the cores that it may run on unless
            somebody has said otherwise.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()
        self.width = max(1, self.threads // TEAMS)
        """Threads of a team."""
        self.teams = self.threads // self.width
        self._board = Board()
        self._starting = threading.Lock()
        self._is_started = False

    def begin(self, tasks: Sequence[Task], *, beside: bool = False) -> Job:
        """Work on tasks, without gradients: behind those of jobs that were begun before.

        With one thread, or for one task, the caller works, and that is done when this returns.

        Args:
            tasks: that need no order.
            beside: only when there is nothing else to do.
        """
        job = Job(tasks, self._board)
        if (self.threads == 1 or len(tasks) < 2) and not beside:
            with torch.no_grad():
                while job.left:
                    job.left.popleft()()
        elif tasks:
            self._start()
            self._board.add(job, beside=beside)
        return job

    def run(self, tasks: Sequence[Task]) -> None:
        """Begin, and wait for the end."""
        self.begin(tasks).end()

    def _start(self) -> None:
        with self._starting:
            if not self._is_started:
                _start(self._board, self.teams, self.width)
                weakref.finalize(self, self._board.close).atexit = False
                _BOARDS.add(self._board)
                self._is_started = True


def _start(board: Board, teams: int, width: int) -> None:
    """Threads that run operations on `width` cores, themselves among them.

    The number that a thread sets is its own, and that of threads which PyTorch meets later: so it is set back here.
    """
    mine, all_are_there = torch.get_num_threads(), threading.Barrier(teams + 1)
    try:
        for number in range(teams):
            name, given = f"offload-crew-{number}", (board, all_are_there, width)
            thread = threading.Thread(target=_work, args=given, name=name, daemon=True)
            thread.start()
            board.threads.append(thread)
        all_are_there.wait()
    except BaseException:
        all_are_there.abort()  # interrupted: else they would wait for ever, and the end of the process for them
        raise
    finally:
        torch.set_num_threads(mine)


def _work(board: Board, all_are_there: threading.Barrier, width: int) -> None:
    torch.get_num_threads()  # a thread's first question sets the number of others
    torch.set_num_threads(width)
    try:
        all_are_there.wait()
    except threading.BrokenBarrierError:
        return
    with torch.no_grad():
        board.work()
