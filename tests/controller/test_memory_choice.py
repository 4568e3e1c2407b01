"""Measures are ordered by cost per byte, added until the step fits, and left out again where they are needless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_mp.controller.memory_choice import NOISE, Measure, Trial, Weighed, choose, weigh


def measure(name: str, *, exact: bool = True, by_batch: bool = True, after: str = "") -> Measure:
    return Measure(name=name, exact=exact, by_batch=by_batch, after=after)


FUSED, STATES = measure("fused"), measure("states", exact=False, by_batch=False)
SOME, MORE = measure("budget=0.5"), measure("budget=0.25", after="budget=0.5")
BASE = Trial(peak_bytes=1000, seconds=1.0)


def names(order: Sequence[Weighed]) -> list[str]:
    return [one.measure.name for one in order]


def test_the_cheapest_by_byte_comes_first() -> None:
    alone = {STATES: Trial(peak_bytes=900, seconds=1.5), FUSED: Trial(peak_bytes=500, seconds=2.0)}
    order = weigh(BASE, alone)
    assert names(order) == ["fused", "states"]
    assert [one.saved_bytes for one in order] == [500, 100]
    assert [one.cost for one in order] == [pytest.approx(1 / 500), pytest.approx(0.5 / 100)]


def test_time_within_the_noise_is_none_and_exact_measures_go_before_others_then() -> None:
    alone = {STATES: Trial(peak_bytes=100, seconds=0.9), FUSED: Trial(peak_bytes=900, seconds=1 + NOISE / 2)}
    assert names(weigh(BASE, alone)) == ["fused", "states"]
    assert {one.cost for one in weigh(BASE, alone)} == {0.0}
    slower = {**alone, FUSED: Trial(peak_bytes=900, seconds=1 + 2 * NOISE)}
    assert names(weigh(BASE, slower)) == ["states", "fused"]


def test_of_measures_of_equal_cost_the_one_that_saves_more_is_first() -> None:
    other = measure("other")
    alone = {other: Trial(peak_bytes=900, seconds=1.0), FUSED: Trial(peak_bytes=500, seconds=1.0)}
    assert names(weigh(BASE, alone)) == ["fused", "other"]


def test_a_further_step_is_weighed_beside_the_one_before_it() -> None:
    alone = {SOME: Trial(peak_bytes=800, seconds=1.1), MORE: Trial(peak_bytes=700, seconds=1.6)}
    order = weigh(BASE, alone)
    assert names(order) == ["budget=0.5", "budget=0.25"]
    assert order[1].saved_bytes == 100
    assert order[1].extra_seconds == pytest.approx(0.5)


def test_steps_that_get_cheaper_on_the_way_count_as_one() -> None:
    """The first step saves nothing, the second a lot: both come before a measure that is dearer than they together."""
    alone = {
        STATES: Trial(peak_bytes=900, seconds=1.5),
        SOME: Trial(peak_bytes=1000, seconds=1.1),
        MORE: Trial(peak_bytes=500, seconds=1.2),
    }
    order = weigh(BASE, alone)
    assert names(order) == ["budget=0.5", "budget=0.25", "states"]
    assert order[0].cost == order[1].cost == pytest.approx(0.2 / 500)


def test_what_saves_nothing_alone_or_could_not_be_tried_comes_last() -> None:
    nothing, unknown = measure("nothing"), measure("unknown")
    alone = {
        unknown: Trial(peak_bytes=None),
        nothing: Trial(peak_bytes=1000, seconds=1.0),
        STATES: Trial(peak_bytes=1, seconds=9.0),
    }
    order = weigh(BASE, alone)
    assert names(order)[0] == "states"
    assert [one.cost for one in order[1:]] == [math.inf, math.inf]
    assert order[-1].saved_bytes is None or order[-2].saved_bytes is None


def test_only_what_goes_by_the_batch_grows_with_it() -> None:
    alone = {FUSED: Trial(peak_bytes=900, seconds=1.1), STATES: Trial(peak_bytes=800, seconds=1.1)}
    by_name = {one.measure.name: one for one in weigh(BASE, alone, scale=8.0)}
    assert (by_name["fused"].saved_bytes, by_name["states"].saved_bytes) == (800, 200)
    assert by_name["fused"].extra_seconds == pytest.approx(0.8)
    assert by_name["states"].extra_seconds == pytest.approx(0.1)


class Steps:
    """Steps whose peak is the highest of several points, each lowered by some measures."""

    def __init__(self, points: Sequence[tuple[int, dict[str, int]]]) -> None:
        self.points = points
        self.tried: list[tuple[str, ...]] = []

    def peak(self, taken: Sequence[Measure]) -> int:
        return max(height - sum(lowers.get(m.name, 0) for m in taken) for height, lowers in self.points)

    def __call__(self, taken: tuple[Measure, ...]) -> Trial:
        self.tried.append(tuple(m.name for m in taken))
        return Trial(peak_bytes=self.peak(taken))


def order_of(*measures: Measure, seconds: Sequence[float] | None = None) -> list[Weighed]:
    times = seconds or [0.1] * len(measures)
    return [Weighed(measure=m, saved_bytes=1, extra_seconds=s, cost=s) for m, s in zip(measures, times, strict=True)]


def test_measures_are_added_until_the_step_fits_and_no_further() -> None:
    steps = Steps([(1000, {"fused": 300, "states": 300})])
    found = choose(order_of(FUSED, STATES), steps, limit_bytes=700)
    assert (found.taken, found.fits, found.trial) == ((FUSED,), True, Trial(peak_bytes=700))
    assert steps.tried == [("fused",)]


def test_a_measure_that_was_taken_early_and_is_needless_is_left_out() -> None:
    steps = Steps([(1000, {"fused": 100, "states": 600})])
    found = choose(order_of(FUSED, STATES), steps, limit_bytes=500)
    assert (found.taken, found.needless, found.fits) == ((STATES,), (FUSED,), True)
    assert found.trial.peak_bytes == 400


def test_the_slowest_is_left_out_first() -> None:
    """Either of two would do beside the last: the slow one goes."""
    a, b, c = measure("a"), measure("b"), measure("c")
    steps = Steps([(1000, {"a": 100, "b": 100, "c": 500})])
    found = choose(order_of(a, b, c, seconds=[0.1, 0.5, 0.7]), steps, limit_bytes=400)
    assert (found.taken, found.needless) == ((a, c), (b,))


def test_a_measure_that_another_one_builds_on_stays() -> None:
    steps = Steps([(1000, {"budget=0.5": 0, "budget=0.25": 600})])
    found = choose(order_of(SOME, MORE), steps, limit_bytes=500)
    assert found.taken == (SOME, MORE)
    assert steps.tried == [("budget=0.5",), ("budget=0.5", "budget=0.25")]


def test_a_way_is_gone_back_step_by_step() -> None:
    steps = Steps([(1000, {"budget=0.5": 0, "budget=0.25": 0, "states": 600})])
    found = choose(order_of(SOME, MORE, STATES), steps, limit_bytes=500)
    assert found.taken == (STATES,)
    assert steps.tried[-2:] == [("budget=0.5", "states"), ("states",)]


def test_what_saves_nothing_alone_may_be_needed_beside_another() -> None:
    """The activations are the highest point only when the optimizer's step is not."""
    steps = Steps([(1000, {"states": 800}), (900, {"fused": 700})])
    found = choose(order_of(STATES, FUSED), steps, limit_bytes=300)
    assert (found.taken, found.fits) == ((STATES, FUSED), True)


def test_a_limit_out_of_reach_gives_the_smallest_peak() -> None:
    steps = Steps([(1000, {"fused": 300, "states": -50})])
    found = choose(order_of(FUSED, STATES), steps, limit_bytes=100)
    assert (found.fits, found.taken, found.trial.peak_bytes) == (False, (FUSED,), 700)
    assert choose([], steps, limit_bytes=1).trial.peak_bytes is None


def test_a_step_that_ran_out_of_memory_does_not_fit() -> None:
    found = choose(order_of(FUSED), lambda _: Trial(peak_bytes=None), limit_bytes=10**12)
    assert not found.fits


@settings(max_examples=200, deadline=None)
@given(
    saved=st.lists(st.integers(0, 100), min_size=1, max_size=5),
    limit=st.integers(0, 400),
)
def test_whatever_is_taken_fits_and_nothing_of_it_can_be_left_out(saved: list[int], limit: int) -> None:
    measures = [measure(str(number)) for number in range(len(saved))]
    steps = Steps([(300, {str(number): value for number, value in enumerate(saved)})])
    found = choose(order_of(*measures), steps, limit_bytes=limit)
    reachable = 300 - sum(saved) <= limit
    assert found.fits == reachable
    assert len(set(steps.tried)) == len(steps.tried)
    if found.fits and found.taken:
        assert steps.peak(found.taken) <= limit
        alone = [one for one in combinations(found.taken, len(found.taken) - 1) if steps.peak(one) <= limit]
        assert not alone or limit >= 300
