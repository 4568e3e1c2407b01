"""Times a call on any device: device events where the device has them, the host's clock elsewhere.

Calls are issued back to back and each one's time is the gap between two marks on the device's own
queue. A step that waits for the host to launch its kernels is so timed as training would see it, and
nothing synchronises between calls. A single layer is another matter: in a whole step the host may be
far ahead when it comes to it, launching during longer kernels before. So its calls are timed once
more behind a pause of the device in which the host issues all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from deepseek_mp.backends import synchronize

MAX_RUNS = 20
AHEAD = 8
"""Calls timed behind a pause: few enough for the launch queue to take all their kernels."""
LONG_MS = 10.0
"""No host takes that long to launch what one layer does."""
HOLD, CYCLES = 1.5, 2e9
"""The pause lasts so many times the calls' median of before; and a device's cycles in a second, rather too many."""
_MEMORY_MESSAGES = (
    "out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "out_of_device_memory",
    "out_of_host_memory",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds per call over `runs` calls: the median, the shortest and the longest."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    device_ms: float | None = None
    """The median where the device never waited for the host; None where that was not asked or cannot be had."""

    @property
    def without_host_ms(self) -> float:
        """The device's own time where it is known, else the median."""
        return self.median_ms if self.device_ms is None else self.device_ms

    def __post_init__(self) -> None:
        ordered = 0 <= self.low_ms <= self.median_ms <= self.high_ms and math.isfinite(self.high_ms)
        ordered = ordered and (self.device_ms is None or 0 <= self.device_ms < math.inf)
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
        device_ms = data["device_ms"]
        return cls(
            median_ms=float(data["median_ms"]),
            low_ms=float(data["low_ms"]),
            high_ms=float(data["high_ms"]),
            runs=int(data["runs"]),
            device_ms=None if device_ms is None else float(device_ms),
        )


def time_call(
    fn: Callable[[], object],
    device: torch.device,
    *,
    budget_s: float,
    min_runs: int = 3,
    warmup: int = 1,
    host_ahead: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """The time of `fn()`: `warmup` calls untimed, then `min_runs` or more until `budget_s` is used.

    At most 20 calls are timed, `min_runs` if that is more; warm-up is not part of the budget. With
    `host_ahead` some more give `Timing.device_ms`, on devices whose queue can be paused. What `fn`
    raises, out-of-memory included, is left to the caller (`is_out_of_memory`).
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
        timing = Timing.of(samples)
        pause = getattr(torch.get_device_module(device), "_sleep", None) if host_ahead else None
        if pause is None or timing.median_ms >= LONG_MS:
            return timing
        pause(round(CYCLES * HOLD * AHEAD * 1e-3 * timing.median_ms))
        return replace(timing, device_ms=median(_laps(fn, device, AHEAD, clock)))


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
    """Whether an exception, or one that it was raised from, says that memory did not suffice, on whatever device.

    Also one that PyTorch's backward raises where it has lost another: out of memory in a checkpointed part ends so.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, SystemError):
        return "run_backward" in str(error) and "without setting an exception" in str(error)
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(message in text for message in _MEMORY_MESSAGES):
        return True
    cause = error.__cause__
    return cause is not None and cause is not error and is_out_of_memory(cause)
