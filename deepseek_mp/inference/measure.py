"""Latency, memory and energy of calls; several calls take turns, so that a drifting machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from deepseek_mp.backends import energy_joules, synchronize
from deepseek_mp.costs.timing import time_call

ROUNDS = 4
"""Visits to each call."""
P95 = 0.95


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds a call takes, as whoever waits for it sees them."""

    median_ms: float
    p95_ms: float
    runs: int

    @classmethod
    def of(cls, samples_ms: list[float]) -> Latency:
        ordered = sorted(samples_ms)
        last = min(len(ordered) - 1, round(P95 * (len(ordered) - 1)))
        return cls(median_ms=statistics.median(ordered), p95_ms=ordered[last], runs=len(ordered))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules of a call, by the device's own counter over a window of calls."""

    joules: float
    idle_watts: float
    """What the device draws without work, measured just before."""
    window_s: float
    calls: int

    @property
    def above_idle_joules(self) -> float:
        """Without what the device would have drawn anyway."""
        return self.joules - self.idle_watts * self.window_s / self.calls

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "above_idle_joules": self.above_idle_joules}


def latencies(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """The latency of each of some warm calls, timed one at a time with the device idle before and after.

    Args:
        seconds: for each call, shared out over `ROUNDS` visits of at least two calls.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            started = clock()
            taken = 0
            while taken < 2 or clock() - started < seconds / ROUNDS:
                synchronize(device)
                before = clock()
                calls[name]()
                synchronize(device)
                samples[name].append(1e3 * (clock() - before))
                taken += 1
    return {name: Latency.of(found) for name, found in samples.items()}


def energy(
    call: Callable[[], object],
    device: torch.device,
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy | None:
    """Joules of a warm call; None where the device has no counter (`backends.energy_joules`).

    Args:
        seconds: of calls one after the other. Counters advance some ten times a second: windows of seconds tell little,
            one of 30 can be trusted. A quarter of it is spent idle before.
    """
    if energy_joules(device) is None:
        return None
    synchronize(device)
    idle = _joules(device)
    sleep(seconds / 4)
    idle_watts = (_joules(device) - idle) / (seconds / 4)
    started, before, calls = clock(), _joules(device), 0
    while clock() - started < seconds:
        time_call(call, device, budget_s=0.0, min_runs=1, warmup=0)
        calls += 1
    synchronize(device)
    window = clock() - started
    return Energy(joules=(_joules(device) - before) / calls, idle_watts=idle_watts, window_s=window, calls=calls)


def _joules(device: torch.device) -> float:
    found = energy_joules(device)
    assert found is not None, "asked only of devices with a counter"
    return found
