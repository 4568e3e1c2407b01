"""How long a probe takes beside a step, without waiting for either."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

LEAST_STEPS = 8
"""Steps without a probe that must have been seen."""
WARM = 1
"""Probes that are not counted: the first makes kernels ready."""
KEPT = 64


class ProbeClock:
    """Times probes by the device's events, and steps by when they were known to be done."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=KEPT)
        self._last: float | None = None
        self._probed = False
        self._spent = 0.0
        self._events: deque[tuple[Any, Any]] = deque(maxlen=KEPT)
        self._probes: deque[float] = deque(maxlen=KEPT)
        self._count = 0

    def step(self) -> float | None:
        """A step is known to be done: its seconds, but of the first one and of those with a probe in them.

        For a probe's share those with one count without it, while there are few others.
        """
        now = time.perf_counter()
        plain = None if self._last is None or self._probed else now - self._last
        if self._last is not None and (not self._probed or len(self._steps) < LEAST_STEPS):
            self._steps.append(now - self._last - (self._spent if self._probed else 0.0))
        self._last, self._probed = now, False
        return plain

    def forget(self) -> None:
        """Something else than a step comes now: the time until the next outcome is none of a step."""
        self._last = None

    @contextmanager
    def probe(self, device: torch.device) -> Iterator[None]:
        """Around a probe."""
        module = None if device.type == "cpu" else torch.get_device_module(device)
        started = time.perf_counter()
        begin = end = None
        if module is not None and hasattr(module, "Event"):
            begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
            begin.record()
        yield
        self._probed = True
        self._spent = time.perf_counter() - started
        self._count += 1
        if self._count <= WARM:
            return
        # Where the host is slower than the device its time is what the step waits for.
        self._probes.append(self._spent)
        if begin is not None and end is not None:
            end.record()
            self._events.append((begin, end))

    def share(self) -> float | None:
        """A probe's time over a step's; None as long as it is not known."""
        done = [begin.elapsed_time(end) / 1e3 for begin, end in self._events if end.query()]
        if self._events and not done:
            return None
        if not self._probes or len(self._steps) < LEAST_STEPS:
            return None
        return max(median(self._probes), median(done) if done else 0.0) / median(self._steps)
