"""Times a call on any device: device events where the device has them, the host's clock elsewhere.

Calls are issued back to back and each one's time is the gap between two marks on the device's own
queue. A step that waits for the host to launch its kernels is so timed as training would see it, and
nothing synchronises between calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from deepseek_mp.backends import synchronize

MAX_RUNS = 20
_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "alloc_failed")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds per call over `runs` calls: the median, the shortest and the longest."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int

    def __post_init__(self) -> None:
        ordered = 0 <= self.low_ms <= self.median_ms <= self.high_ms and math.isfinite(self.high_ms)
        if not ordered or self.runs < 1:
            raise ValueError(f"{self} is no timing: 0 <= low <= median <= high, all finite, over at least one run")

    @classmethod
    def of(cls, samples_ms: list[float]) -> Timing:
        """The timing of these samples, in milliseconds."""
        return cls(median_ms=median(samples_ms), low_ms=min(samples_ms), high_ms=max(samples_ms), runs=len(samples_ms))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timing:
        """The timing that `to_json` wrote; KeyError, TypeError or ValueError on anything else."""
        return cls(
            median_ms=float(data["median_ms"]),
            low_ms=float(data["low_ms"]),
            high_ms=float(data["high_ms"]),
            runs=int(data["runs"]),
        )


def time_call(
    fn: Callable[[], object],
    device: torch.device,
    *,
    budget_s: float,
    min_runs: int = 3,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """The time of `fn()`: `warmup` calls untimed, then `min_runs` or more until `budget_s` is used.

    At most 20 calls are timed, `min_runs` if that is more; warm-up is not part of the budget. What
    `fn` raises, out-of-memory included, is left to the caller (`is_out_of_memory`).
    """
    with current_device(device):
        for _ in range(warmup):
            fn()
        synchronize(device)
        started = clock()
        samples = _laps(fn, device, min_runs, clock)
        used = clock() - started
        fit = int((budget_s - used) / max(used / min_runs, 1e-9))
        more = min(MAX_RUNS - min_runs, fit)
        if more > 0:
            samples += _laps(fn, device, more, clock)
    return Timing.of(samples)


def _laps(fn: Callable[[], object], device: torch.device, count: int, clock: Callable[[], float]) -> list[float]:
    """Milliseconds of each of `count` calls made one after the other."""
    event = None if device.type == "cpu" else getattr(torch.get_device_module(device), "Event", None)
    if event is None:
        stamps = [clock()]
        for _ in range(count):
            fn()
            synchronize(device)
            stamps.append(clock())
        return [1e3 * (end - start) for start, end in pairwise(stamps)]
    marks = [event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        fn()
        mark.record()
    synchronize(device)
    return [float(start.elapsed_time(end)) for start, end in pairwise(marks)]


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one: events and generators are the current device's."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _MEMORY_MESSAGES)
