"""`Worker`: runs the host's steps one after the other beside forward and backward, on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch


class Worker(Protocol):
    """Runs tasks in the order in which they come."""

    def submit(self, task: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run the task at some time, without gradients."""


class ThreadWorker:
    """One thread, started by the first task."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offload")

    def submit(self, task: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._pool.submit(without_gradients, task, *args)


def without_gradients(task: Callable[..., Any], *args: Any) -> Any:
    """Each thread has a mode of its own, which begins with gradients."""
    with torch.no_grad():
        return task(*args)


def finish(worker: Worker) -> None:
    """Wait until everything has ended that a worker was given, whatever became of it."""
    worker.submit(_nothing).exception()


def _nothing() -> None:
    """Its end is that of the tasks before it."""
