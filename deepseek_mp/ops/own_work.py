"""Marks what this package computes beside a model on a thread, so that it is not counted as the model's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Here(threading.local):
    """Has its value in every thread from the start: compiled code that asks would be compiled again when it comes."""

    on = False


_here = _Here()


@contextmanager
def own_work() -> Iterator[None]:
    """Context for what is measured or kept, and is no part of the model: without gradients, and not counted."""
    before = is_own_work()
    _here.on = True
    try:
        with torch.no_grad():
            yield
    finally:
        _here.on = before


def is_own_work() -> bool:
    """Whether this thread is inside `own_work`."""
    return _here.on
