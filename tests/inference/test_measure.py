"""Latency and energy by clocks and counters of the test's own."""

import pytest
import torch

from deepseek_mp.inference import Latency, energy, latencies, measure

CPU = torch.device("cpu")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_a_latency_is_the_median_and_what_one_in_twenty_exceeds():
    found = Latency.of([float(n) for n in range(100, 0, -1)])
    assert (found.median_ms, found.p95_ms, found.runs) == (50.5, 95.0, 100)
    assert Latency.of([3.0]) == Latency(median_ms=3.0, p95_ms=3.0, runs=1)


def test_calls_take_turns_and_each_gets_its_time():
    clock, order = Clock(), []

    def call(name, seconds):
        order.append(name)
        clock.passes(seconds)

    found = latencies({"a": lambda: call("a", 0.1), "b": lambda: call("b", 0.5)}, CPU, seconds=1.0, clock=clock)
    assert found["a"].median_ms == pytest.approx(100)
    assert found["b"].median_ms == pytest.approx(500)
    assert found["b"].runs == 2 * measure.ROUNDS, "two of each visit at least"
    visits = [name for name, last in zip(order, [None, *order[:-1]], strict=True) if name != last]
    assert visits == ["a", "b", "a", "b", "a"], "every other round in reverse, so that neither is always first"


def test_energy_is_the_counters_difference_by_call_and_idle_is_told(monkeypatch):
    clock = Clock()
    watts = {"now": 50.0}

    def joules(device):
        return joules.total + watts["now"] * (clock() - joules.since)

    joules.total, joules.since = 0.0, 0.0

    def call():
        joules.total, joules.since = joules(CPU), clock()
        watts["now"] = 400.0
        clock.passes(0.25)
        joules.total, joules.since = joules(CPU), clock()
        watts["now"] = 50.0

    monkeypatch.setattr(measure, "energy_joules", joules)
    monkeypatch.setattr(measure, "time_call", lambda fn, device, **_: fn())
    found = energy(call, CPU, seconds=2.0, clock=clock, sleep=clock.passes)
    assert found.calls == 8
    assert found.idle_watts == pytest.approx(50)
    assert found.joules == pytest.approx(100)
    assert found.above_idle_joules == pytest.approx(100 - 50 * 0.25)
    assert found.to_json()["above_idle_joules"] == found.above_idle_joules


def test_no_counter_no_energy(monkeypatch):
    monkeypatch.setattr(measure, "energy_joules", lambda device: None)
    assert energy(lambda: pytest.fail("nothing is run"), CPU, seconds=1.0) is None
