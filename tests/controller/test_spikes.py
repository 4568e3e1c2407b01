"""The rule for spikes of single layers, with made-up gradients."""

import json
import math
import random

import pytest

from deepseek_mp.controller.spikes import HELD, LEAST, NORM, RMS, Course, Gradient, Rate, Spikes

NAMES = tuple("abcdefghijklmnopqrstuvwxy")


def usual(spikes, names=("a", "b"), steps=LEAST, begin=0, scatter=0.1, lowered=None, rms=1.0):
    """Steps of gradients that scatter a little around 1; what they raised."""
    generator, made = random.Random(begin), []
    for step in range(begin, begin + steps):
        seen = {
            name: Gradient(norm=math.exp(generator.gauss(0, scatter)), rms=rms * math.exp(generator.gauss(0, 0.05)))
            for name in names
        }
        made += spikes.see(step, seen, names if lowered is None else lowered, units=len(names))
    return made


@pytest.mark.parametrize(
    ("gradient", "guard", "limit"),
    [(Gradient(norm=6.0, rms=1.0), NORM, 5.0), (Gradient(norm=1.0, rms=2.5), RMS, 2.3)],
)
def test_a_spike_is_found_with_its_numbers(gradient, guard, limit):
    spikes = Spikes()
    assert usual(spikes) == []
    if guard == RMS:  # which may be the batch
        assert spikes.see(39, {"a": gradient}, ("a", "b"), units=2) == []
    (spike,) = spikes.see(40, {"a": gradient, "b": Gradient(norm=1.0, rms=1.0)}, ("a", "b"), units=2)
    assert (spike.layer, spike.guard) == ("a", guard)
    assert spike.limit == pytest.approx(limit, rel=0.05)
    assert spike.usual == pytest.approx(1.0, rel=0.06)
    assert spikes.held == {"a": 40 + HELD}
    assert f"usually {spike.usual:.3g}" in spike.words


@pytest.mark.parametrize("gradient", [Gradient(norm=4.5, rms=1.0), Gradient(norm=1.0, rms=2.2)])
def test_what_is_below_the_limit_is_none(gradient):
    spikes = Spikes()
    usual(spikes)
    assert spikes.see(40, {"a": gradient}, ("a",), units=2) == []


def test_only_what_is_lowered_is_raised_but_all_are_known():
    spikes = Spikes()
    usual(spikes, lowered=())
    seen = {"a": Gradient(norm=9.0), "b": Gradient(norm=8.0)}
    assert [spike.layer for spike in spikes.see(40, seen, ("b",), units=2)] == ["b"]


def test_nothing_is_a_spike_before_enough_was_seen():
    spikes = Spikes()
    usual(spikes, steps=LEAST - 1)
    assert spikes.see(40, {"a": Gradient(norm=9.0)}, ("a",), units=2) == []


def test_a_tenth_of_the_layers_is_held_at_once_and_the_worst_first():
    spikes = Spikes()
    usual(spikes, NAMES)
    seen = {name: Gradient(norm=10.0 + number) for number, name in enumerate(NAMES)}
    assert [spike.layer for spike in spikes.see(40, seen, NAMES, units=len(NAMES))] == ["y", "x"]
    left = {name: gradient for name, gradient in seen.items() if name not in "xy"}
    assert spikes.see(41, left, NAMES[:-2], units=len(NAMES)) == []
    usual(spikes, NAMES, steps=60, begin=42)
    found = spikes.see(40 + HELD, seen, NAMES, units=len(NAMES))
    assert [spike.layer for spike in found] == ["y", "x"]


def test_where_gradients_always_scatter_by_as_much_there_is_no_spike():
    spikes = Spikes()
    assert usual(spikes, steps=2000, scatter=1.0) == []
    assert max(spikes.courses["a"][NORM].scatter ** 0.5, 0) == pytest.approx(1.0, abs=0.25)


def test_a_level_that_stays_is_usual_after_a_while():
    spikes = Spikes()
    usual(spikes)
    found = [bool(spikes.see(step, {"a": Gradient(norm=20.0)}, ("a",), units=2)) for step in range(40, 500)]
    assert found[0]
    assert sum(found) == 1
    assert spikes.courses["a"][NORM].mean == pytest.approx(20.0, rel=0.01)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_numbers_that_say_nothing_are_left_out(value):
    spikes = Spikes()
    usual(spikes)
    before = spikes.state_dict()
    assert spikes.see(40, {"a": Gradient(norm=value, rms=value)}, ("a",), units=2) == []
    assert spikes.state_dict() == before


def test_a_restored_rule_goes_on():
    one, other = Spikes(), Spikes()
    usual(one)
    one.see(40, {"a": Gradient(norm=9.0)}, ("a",), units=2)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other == one
    assert usual(one, begin=41) == usual(other, begin=41)
    assert other == one


def test_two_batches_apart_have_not_outgrown_the_second_moment():
    spikes, high = Spikes(), {"a": Gradient(norm=1.0, rms=3.0)}
    usual(spikes)
    for step in range(40, 60, 2):
        assert spikes.see(step, high, ("a",), units=2) == []
        assert spikes.see(step + 1, {"a": Gradient(norm=1.0, rms=1.0)}, ("a",), units=2) == []


def test_a_spike_does_not_make_the_next_one_usual():
    spikes = Spikes()
    usual(spikes)
    spikes.see(40, {"a": Gradient(norm=1e6)}, ("a",), units=2)
    assert spikes.courses["a"][NORM].mean < 1.2
    assert spikes.see(40 + HELD, {"a": Gradient(norm=9.0)}, ("a",), units=2)


def test_the_means_are_plain_ones_at_first():
    course = Course()
    for value in (1.0, 2.0, 3.0):
        course.add(value)
    assert course.mean == pytest.approx(2.0)
    assert course.log == pytest.approx(math.log(6) / 3)


@pytest.mark.parametrize(
    ("rates", "jumps"),
    [
        ([0.1, 0.2, 0.6, 0.7, 0.8, 0.9], []),  # the first three are a warm-up
        ([1.0, 0.6, 0.2, 1.0, 0.5], []),  # a restart
        ([1.0, 1.0, 1.0, 5.0, 5.0, 1.0, 1.6], [3, 4, 6]),
        ([1.0] * 3 + [5.0] * 12, list(range(3, 13))),  # it is usual after ten steps
        ([0.0, 0.0, 0.0, 1.0, 1.0], []),
    ],
)
def test_a_learning_rate_jumps_when_it_is_far_above_the_highest_before(rates, jumps):
    known = Rate()
    assert [step for step, rate in enumerate(rates) if known.is_high(rate, 10, warm=step > 2)] == jumps
