"""Says on its thread that the forward under way is not the step's own: it is being measured, or computed again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Here(threading.local):
    """Has its value in every thread from the start: compiled code that asks would be compiled again when it comes."""

    on = False


_here = _Here()


@contextmanager
def computed_again() -> Iterator[None]:
    """Inside, whoever counts calls and operations of the model leaves them out."""
    before = is_computed_again()
    _here.on = True
    try:
        yield
    finally:
        _here.on = before


def is_computed_again() -> bool:
    """Whether this thread is inside `computed_again`."""
    return _here.on
