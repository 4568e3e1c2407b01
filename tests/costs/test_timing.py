"""Timing calls with a fake clock and a fake device, and telling out-of-memory from other errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepseek_mp.costs import timing
from deepseek_mp.costs.timing import MAX_RUNS, Timing, is_out_of_memory, time_call

CPU = torch.device("cpu")


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """A call that takes the given seconds, the last of them for ever."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def __call__(self) -> None:
        self.clock.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1


def test_warmup_is_not_timed_and_the_median_low_and_high_are_kept() -> None:
    clock = Clock()
    work = Work(clock, 100.0, 0.004, 0.001, 0.002)
    result = time_call(work, CPU, budget_s=0.0, clock=clock)
    assert (result.median_ms, result.low_ms, result.high_ms) == pytest.approx((2.0, 1.0, 4.0))
    assert (result.runs, work.calls) == (3, 4)


def test_calls_go_on_until_the_budget_is_used() -> None:
    clock = Clock()
    assert time_call(Work(clock, 0.1), CPU, budget_s=0.95, clock=clock).runs == 9


def test_no_more_than_max_runs_are_timed_unless_the_caller_wants_them() -> None:
    clock = Clock()
    assert time_call(Work(clock, 0.001), CPU, budget_s=60.0, clock=clock).runs == MAX_RUNS
    assert time_call(Work(clock, 0.001), CPU, budget_s=60.0, min_runs=30, clock=clock).runs == 30


def test_a_call_that_takes_no_time_does_not_divide_by_zero() -> None:
    clock = Clock()
    result = time_call(Work(clock, 0.0), CPU, budget_s=1.0, clock=clock)
    assert (result.median_ms, result.runs) == (0.0, MAX_RUNS)


def test_a_device_with_events_is_timed_on_its_own_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(), []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("mark")
            self.at = clock.now

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(timing, "synchronize", lambda device: log.append("wait"))
    result = time_call(Work(clock, 0.5, 0.002), torch.device("cuda"), budget_s=0.0, clock=clock)
    assert result.median_ms == pytest.approx(2.0)
    assert log == ["wait", "mark", "mark", "mark", "mark", "wait"], "nothing waits between calls"


def test_the_devices_own_time_is_taken_behind_a_pause_that_covers_what_the_host_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host takes 5 ms a call, the device 2 ms: it is done with a call when both are."""
    host, free, paused = 0.0, 0.0, []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(host, free)

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    def sleep(cycles: int) -> None:
        nonlocal free
        paused.append(cycles / timing.CYCLES)
        free = max(host, free) + paused[-1]

    def call() -> None:
        nonlocal host, free
        host += 0.005
        free = max(host, free) + 0.002

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event, _sleep=sleep))
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    clock = lambda: host  # noqa: E731
    plain = time_call(call, torch.device("cuda"), budget_s=0.0, clock=clock)
    assert (plain.device_ms, plain.without_host_ms) == (None, pytest.approx(5.0))
    found = time_call(call, torch.device("cuda"), budget_s=0.0, host_ahead=True, clock=clock)
    assert (found.median_ms, found.device_ms) == (pytest.approx(5.0), pytest.approx(2.0))
    assert found.without_host_ms == found.device_ms
    assert paused == [pytest.approx(timing.HOLD * timing.AHEAD * 0.005)]
    assert Timing.from_json(found.to_json()) == found


def test_a_device_without_events_waits_after_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = Clock(), []
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    monkeypatch.setattr(timing, "synchronize", lambda device: waits.append(device))
    result = time_call(Work(clock, 0.002), torch.device("mps"), budget_s=0.0, clock=clock)
    assert result.median_ms == pytest.approx(2.0)
    assert len(waits) == 4


def test_what_the_call_raises_is_the_callers() -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        time_call(fail, CPU, budget_s=1.0)


def test_a_timing_survives_json_and_refuses_nonsense() -> None:
    one = Timing(median_ms=2.0, low_ms=1.0, high_ms=3.0, runs=4)
    assert Timing.from_json(one.to_json()) == one
    for wrong in ({"median_ms": float("nan")}, {"low_ms": 9.0}, {"runs": 0}):
        with pytest.raises(ValueError, match="is no timing"):
            Timing.from_json({**one.to_json(), **wrong})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), True),
        (RuntimeError("NPU out of memory. Tried to allocate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried 9 bytes"), True),
        (RuntimeError("level_zero backend failed with error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("expected scalar type Float"), False),
        (ValueError("out of memory"), False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_out_of_memory_is_known_on_every_device(error: Exception, *, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_error_raised_from_one_of_memory_is_one() -> None:
    """As libraries and compilers wrap what goes wrong below them; what was merely being handled does not count."""
    memory = torch.OutOfMemoryError("CUDA out of memory")
    wrapped = ValueError("the layer failed")
    wrapped.__cause__ = memory
    twice = KeyError("the model failed")
    twice.__cause__ = wrapped
    beside = ValueError("a mistake")
    beside.__context__ = memory
    assert [is_out_of_memory(error) for error in (wrapped, twice, beside)] == [True, True, False]
