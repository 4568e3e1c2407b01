"""Says on its thread that the forward under way is not the step's own: it is being measured, or computed again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_here = threading.local()


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
    return getattr(_here, "on", False)
