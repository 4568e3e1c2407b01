"""`calibrate`: rates from a clock, within its time."""

import importlib
import itertools

import pytest
import torch

from deepseek_mp.optim.offload.calibrate import calibrate, typical
from deepseek_mp.optim.offload.lanes import DirectLanes

module = importlib.import_module("deepseek_mp.optim.offload.calibrate")  # the package has the function by this name


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TimedLanes(DirectLanes):
    def __init__(self, clock, down, up):
        self.clock, self.seconds = clock, {"down": down, "up": up}

    def down(self, target, source):
        self.clock.now += self.seconds["down"]

    def up(self, targets, sources):
        self.clock.now += self.seconds["up"]


def test_rates_are_bytes_per_second():
    clock = Clock()
    found = calibrate(
        "cpu",
        values=1000,
        step_values=1000,
        lanes=lambda _: TimedLanes(clock, 0.25, 0.5),
        clock=_ticking(clock),
        seconds=6.0,
    )
    assert found.down == pytest.approx(4000 / 0.25, rel=0.01)
    assert found.up == pytest.approx(4000 / 0.5, rel=0.01)
    assert found.cpu > 4000


def _ticking(clock):
    def read():
        clock.now += 1e-3
        return clock.now

    return read


def test_runs_on_this_machine():
    found = calibrate("cpu", seconds=0.05, values=1 << 16, step_values=1 << 16)
    assert min(found.down, found.up, found.cpu) > 0
    assert found.keep is None or found.keep > 0


def test_keeping_the_state_has_a_rate_of_its_own(monkeypatch):
    clock = Clock()

    def host_step(values, *, keep):
        def step():
            clock.now += 0.5 if keep else 0.2

        return step

    monkeypatch.setattr(module, "_host_step", host_step)
    found = calibrate("cpu", values=10, step_values=100, lanes=lambda _: TimedLanes(clock, 0.1, 0.1), clock=clock)
    assert found.cpu == pytest.approx(100 * 34 / 0.2)
    assert found.keep == pytest.approx(100 * 24 / 0.3)


@pytest.mark.parametrize(("each", "calls"), [(0.3, 3), (5.0, 1)])
def test_ends_in_time_and_measures_at_least_once(each, calls):
    clock, made = Clock(), itertools.count()

    def action():
        next(made)
        clock.now += each

    assert typical(action, 1.0, clock) == pytest.approx(each)
    assert next(made) == calls


def test_the_first_time_is_not_counted():
    clock, times = Clock(), iter([9.0, 1.0, 1.0, 1.0, 30.0])

    def action():
        clock.now += next(times)

    assert typical(action, 20.0, clock) == 1.0
    assert torch.is_grad_enabled()
