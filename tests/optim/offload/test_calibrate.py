"""`calibrate`: rates from a clock, within its time."""

import importlib
import itertools

import pytest
import torch

from deepseek_mp.optim.offload.calibrate import CHUNKS, HostWork, calibrate, typical
from deepseek_mp.optim.offload.host_chunk import HostChunk
from deepseek_mp.optim.offload.lanes import DirectLanes
from deepseek_mp.optim.offload.pieces import Piece

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
    assert min(found.cpu, found.keep, found.land, found.check) > 4000


def _ticking(clock):
    def read():
        clock.now += 1e-3
        return clock.now

    return read


def test_runs_on_this_machine():
    found = calibrate("cpu", seconds=0.05, values=1 << 16, step_values=1 << 16)
    assert min(found.down, found.up, found.cpu, found.keep, found.land, found.check) > 0


def test_landing_keeping_and_stepping_have_rates_of_their_own(monkeypatch):
    clock = Clock()
    seconds = {"land": 0.1, "keep_ahead": 0.3, "begin": 0.2}
    for name, each in seconds.items():
        monkeypatch.setattr(HostChunk, name, _timed(getattr(HostChunk, name), clock, each))
    monkeypatch.setattr(Piece, "norms", _timed(Piece.norms, clock, 0.4))
    lanes = lambda _: TimedLanes(clock, 0.1, 0.1)  # noqa: E731
    found = calibrate("cpu", values=10, step_values=100, lanes=lanes, clock=clock, seconds=60.0)
    assert found.land == pytest.approx(100 * 10 / 0.1)
    assert found.check == pytest.approx(100 * 10 / 0.5)
    assert found.keep == pytest.approx(100 * 36 / 0.3)
    assert found.cpu == pytest.approx(100 * 28 / 0.2)


def _timed(real, clock, seconds):
    def slow(*given, **options):
        clock.now += seconds
        return real(*given, **options)

    return slow


@pytest.mark.parametrize(("first", "chunks"), [(0.01, CHUNKS), (0.2, 2), (5.0, 1)])
def test_the_host_works_on_as_many_chunks_in_turn_as_there_is_time_to_make(monkeypatch, first, chunks):
    clock, worked_on = Clock(), []
    work = HostWork(100, clock)

    def a_round(chunks):
        worked_on.append(len(chunks))
        clock.now += first
        return 1.0, 2.0, 3.0 + len(worked_on)

    monkeypatch.setattr(work, "_round", a_round)
    work.grow(0.5)
    assert (work.values, worked_on) == (100 * chunks, [1] * chunks)
    assert work.typical(3.5 * first) == (1.0, 2.0, 3.0 + chunks + 2.5)
    assert worked_on[chunks:] == [chunks] * 3, "all of them in each round"
    assert work.typical(0.5 * first) == (1.0, 2.0, 3.0 + chunks + 4)


def test_small_machines_have_few_chunks(monkeypatch):
    monkeypatch.setattr(module.os, "sysconf", {"SC_PHYS_PAGES": 16 * 30 * 100, "SC_PAGE_SIZE": 2}.__getitem__)
    work = HostWork(100, Clock())
    work.grow(100.0)
    assert work.values == 200


@torch.no_grad()
def test_what_the_host_does_is_a_step_on_gradients_that_have_arrived():
    work = HostWork(100, itertools.count().__next__)
    work.grow(1.0)
    [slot] = work._chunks[0].slots
    assert torch.equal(slot.total, slot.wire.float())
    assert slot.master.all()
    assert (slot.before.any(), work._states[slot.master]["step"]) == (False, 1)
    work.typical(0.0)
    assert slot.before.all()
    assert work._states[slot.master]["step"] == 2


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
