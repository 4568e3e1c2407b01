"""Measures are ordered by cost per byte, added until the step fits, and left out again where they are needless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_mp.controller.memory_choice import FAR, NOISE, Known, Measure, Trial, Weighed, choose, weigh


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


# -- what is predicted ------------------------------------------------------------------------------------


def weighed(saved: dict[Measure, int | None]) -> list[Weighed]:
    return [Weighed(measure=m, saved_bytes=bytes_, extra_seconds=0.1, cost=0.1) for m, bytes_ in saved.items()]


A, B, C = measure("a"), measure("b"), measure("c")


def test_a_set_that_is_predicted_to_be_far_from_fitting_is_not_tried() -> None:
    saved = {"a": 300, "b": 300, "c": 200}
    steps = Steps([(1000, saved)])
    order = weighed({A: 300, B: 300, C: 200})
    found = choose(order, steps, limit_bytes=250, base_bytes=1000)
    assert (found.taken, found.fits) == ((A, B, C), True)
    assert steps.tried == [("a", "b", "c")]  # leaving one out is predicted to be too much too
    near = Steps([(1000, saved)])
    choose(order, near, limit_bytes=350, base_bytes=1000)
    assert FAR * 350 > 400
    assert near.tried == [("a", "b"), ("a", "b", "c")]


@pytest.mark.parametrize(("base", "saved"), [(None, 300), (1000, None)])
def test_where_nothing_was_weighed_nothing_is_predicted(base: int | None, saved: int | None) -> None:
    steps = Steps([(1000, {"a": 300, "b": 300, "c": 200})])
    choose(weighed({A: saved, B: saved, C: saved}), steps, limit_bytes=250, base_bytes=base)
    assert steps.tried[:3] == [("a",), ("a", "b"), ("a", "b", "c")]


def test_all_measures_are_tried_whatever_is_predicted() -> None:
    """Together they save what none of them does alone."""
    steps = Steps([(1000, {"a": 800}), (1000, {"b": 800})])
    found = choose(weighed({A: 0, B: 0}), steps, limit_bytes=300, base_bytes=1000)
    assert (found.taken, found.fits) == ((A, B), True)
    assert steps.tried[0] == ("a", "b")


def test_a_prediction_that_was_too_high_hides_no_smaller_set() -> None:
    """Of a part of the batch that was weighed nobody could see what `a` saves in the whole."""
    steps = Steps([(1000, {"a": 900, "b": 10, "c": 10})])
    found = choose(weighed({A: 0, B: 10, C: 10}), steps, limit_bytes=300, base_bytes=1000)
    assert (found.taken, found.needless, found.fits) == ((A,), (B, C), True)
    assert steps.tried == [("a", "b", "c"), ("b", "c"), ("a", "c"), ("a",)]


def test_what_was_passed_over_may_make_the_last_measure_needless() -> None:
    steps = Steps([(1000, {"a": 900})])
    found = choose(weighed({A: 0, B: 0}), steps, limit_bytes=300, base_bytes=1000)
    assert (found.taken, found.needless) == ((A,), (B,))


def test_what_is_known_to_go_through_comes_before_a_set_that_is_predicted_not_to_fit() -> None:
    saved = {"a": 300, "b": 300, "c": 100}
    order = weighed({A: 300, B: 300, C: 100})
    known = Known(measures=frozenset("abc"), peak_bytes=300)
    steps = Steps([(1000, saved)])
    found = choose(order, steps, limit_bytes=320, base_bytes=1000, known=known)
    assert (found.taken, found.fits, found.trial.peak_bytes) == ((A, B, C), True, 300)
    assert steps.tried == [("a", "b", "c")]
    alone = Steps([(1000, saved)])
    choose(order, alone, limit_bytes=320, base_bytes=1000)
    assert alone.tried == [("a", "b"), ("a", "b", "c")]


def test_what_is_known_is_less_what_saves_nothing() -> None:
    steps = Steps([(1000, {"a": 300, "b": 400})])
    known = Known(measures=frozenset("abc"), peak_bytes=300)
    found = choose(weighed({A: 300, C: 0, B: 350}), steps, limit_bytes=320, base_bytes=1000, known=known)
    assert (found.taken, found.needless) == ((A, B), (C,))
    assert steps.tried == [("a", "c", "b"), ("a", "b")]


def test_what_is_known_is_not_asked_where_fewer_measures_are_predicted_to_fit() -> None:
    saved = {"a": 300, "b": 300, "c": 300}
    order = weighed({A: 300, B: 300, C: 300})
    known = Known(measures=frozenset("abc"), peak_bytes=100)
    predicted = Steps([(1000, saved)])
    assert choose(order, predicted, limit_bytes=500, base_bytes=1000, known=known).taken == (A, B)
    assert predicted.tried == [("a", "b")]
    comfortable = Steps([(1000, saved)])  # `a` and `b` are tried although they are predicted to be a little short
    found = choose(order, comfortable, limit_bytes=450, base_bytes=1060, known=known)
    assert found.taken == (A, B)
    assert comfortable.tried == [("a", "b")]


def test_a_set_that_is_predicted_to_fit_comes_before_what_is_known() -> None:
    steps = Steps([(1000, {"a": 300, "b": 300, "c": 100})])
    known = Known(measures=frozenset("abc"), peak_bytes=440)
    found = choose(weighed({A: 300, B: 300, C: 100}), steps, limit_bytes=480, base_bytes=1000, known=known)
    assert (found.taken, steps.tried) == ((A, B), [("a", "b")])


def test_what_is_known_comes_next_where_a_set_does_not_fit_though_it_was_predicted_to() -> None:
    d = measure("d")
    steps = Steps([(1000, {"a": 300, "b": 300, "c": 20, "d": 90})])  # of what `b` saves alone, `a` saves half
    known = Known(measures=frozenset("abcd"), peak_bytes=300)
    found = choose(weighed({A: 300, B: 600, C: 20, d: 90}), steps, limit_bytes=310, base_bytes=1000, known=known)
    assert (found.taken, steps.tried) == ((A, B, C, d), [("a", "b"), ("a", "b", "c", "d")])


def test_what_another_measure_builds_on_is_no_reason_to_doubt_what_is_known() -> None:
    steps = Steps([(1000, {"budget=0.5": 5, "budget=0.25": 600, "a": 100})])
    known = Known(measures=frozenset({"budget=0.5", "budget=0.25", "a"}), peak_bytes=300)
    found = choose(weighed({SOME: 5, MORE: 600, A: 100}), steps, limit_bytes=330, base_bytes=1000, known=known)
    assert found.taken == (SOME, MORE, A)
    assert len(steps.tried) == 1


def test_of_what_is_known_nothing_that_saves_is_left_out_again() -> None:
    """All are the first set that is predicted to fit."""
    order, saved = weighed({A: 100, B: 100, C: 500}), {"a": 100, "b": 100, "c": 500}
    known = Known(measures=frozenset("abc"), peak_bytes=300)
    steps = Steps([(1000, saved)])
    assert choose(order, steps, limit_bytes=310, base_bytes=1000, known=known).taken == (A, B, C)
    assert steps.tried == [("a", "b", "c")]
    alone = Steps([(1000, saved)])
    choose(order, alone, limit_bytes=310, base_bytes=1000)
    assert alone.tried == [("a", "b", "c"), ("b", "c"), ("a", "c")]


def test_where_nothing_was_weighed_what_is_known_is_not_asked() -> None:
    steps = Steps([(1000, {"a": 300, "b": 300, "c": 100})])
    known = Known(measures=frozenset("abc"), peak_bytes=300)
    choose(weighed({A: None, B: None, C: None}), steps, limit_bytes=320, known=known)
    assert steps.tried[:3] == [("a",), ("a", "b"), ("a", "b", "c")]


def test_what_is_known_and_does_not_go_through_now_is_tried_once() -> None:
    steps = Steps([(1000, {"a": 300, "b": 300, "c": 50})])
    known = Known(measures=frozenset("abc"), peak_bytes=310)
    found = choose(weighed({A: 300, B: 300, C: 100}), steps, limit_bytes=320, base_bytes=1000, known=known)
    assert not found.fits
    assert steps.tried == [("a", "b", "c"), ("a", "b")]


@settings(max_examples=200, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(300, 600), st.lists(st.integers(0, 300), min_size=4, max_size=4)), min_size=1,
                    max_size=3),
    alone=st.lists(st.integers(-50, 300) | st.none(), min_size=4, max_size=4),
    limit=st.integers(1, 290),
    base=st.none() | st.integers(200, 900),
    known=st.none() | st.tuples(st.sets(st.sampled_from("0123")), st.integers(0, 400)),
)  # fmt: skip
def test_whatever_is_predicted_what_is_taken_fits_if_all_do(
    points: list[tuple[int, list[int]]],
    alone: list[int | None],
    limit: int,
    base: int | None,
    known: tuple[set[str], int] | None,
) -> None:
    measures = [measure(str(number)) for number in range(4)]
    steps = Steps([(height, {str(n): value for n, value in enumerate(lowers)}) for height, lowers in points])
    seen = None if known is None else Known(measures=frozenset(known[0]), peak_bytes=known[1])
    order = weighed(dict(zip(measures, alone, strict=True)))
    found = choose(order, steps, limit_bytes=limit, base_bytes=base, known=seen)
    assert found.fits == (steps.peak(measures) <= limit)
    assert found.trial.peak_bytes == steps.peak(found.taken)
    assert not found.fits or found.trial.peak_bytes <= limit
    assert len({frozenset(one) for one in steps.tried}) == len(steps.tried)


@settings(max_examples=200, deadline=None)
@given(
    saved=st.lists(st.integers(0, 100), min_size=1, max_size=5),
    limit=st.integers(0, 400),
    predicted=st.booleans(),
)
def test_whatever_is_taken_fits_and_nothing_of_it_can_be_left_out(
    saved: list[int], limit: int, predicted: bool
) -> None:
    measures = [measure(str(number)) for number in range(len(saved))]
    steps = Steps([(300, {str(number): value for number, value in enumerate(saved)})])
    order = weighed(dict(zip(measures, saved, strict=True)))
    found = choose(order, steps, limit_bytes=limit, base_bytes=300 if predicted else None)
    reachable = 300 - sum(saved) <= limit
    assert found.fits == reachable
    assert len(set(steps.tried)) == len(steps.tried)
    if found.fits and found.taken:
        assert steps.peak(found.taken) <= limit
        alone = [one for one in combinations(found.taken, len(found.taken) - 1) if steps.peak(one) <= limit]
        assert not alone or limit >= 300
