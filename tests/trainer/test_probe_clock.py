"""A probe's share of a step, by a clock that the test moves."""

import pytest
import torch

from deepseek_mp.trainer import probe_clock
from deepseek_mp.trainer.probe_clock import LEAST_STEPS, ProbeClock


@pytest.fixture
def moved(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(probe_clock.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def steps(clock, move, count, seconds=2.0):
    for _ in range(count):
        move(seconds)
        clock.step()


def probe(clock, move, seconds):
    with clock.probe(torch.device("cpu")):
        move(seconds)
    move(2.0)
    clock.step()


def test_a_share_is_known_after_some_steps_and_a_second_probe(moved):
    clock = ProbeClock()
    steps(clock, moved, LEAST_STEPS + 1)
    assert clock.share() is None
    probe(clock, moved, 100.0)
    assert clock.share() is None
    probe(clock, moved, 6.0)
    assert clock.share() == pytest.approx(3.0)


def test_steps_with_a_probe_do_not_count(moved):
    clock = ProbeClock()
    for _ in range(3):
        probe(clock, moved, 10.0)
    assert clock.share() is None
    steps(clock, moved, LEAST_STEPS)
    assert clock.share() == pytest.approx(5.0)


def test_what_is_no_step_is_forgotten(moved):
    clock = ProbeClock()
    steps(clock, moved, 2)
    moved(60.0)
    clock.forget()
    moved(2.0)
    assert clock.step() is None
    moved(2.0)
    assert clock.step() == pytest.approx(2.0)
