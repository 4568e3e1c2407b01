"""Which trial comes next and which candidate wins, with made-up timings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_mp.costs.decide import (
    CHEAP_S,
    PREFERENCE,
    TIE,
    Candidate,
    Failure,
    Trial,
    decide,
    expected_seconds,
    next_trial,
)
from deepseek_mp.precision import Reason

ALL = [Candidate(format=f, memory_format=m) for f in PREFERENCE for m in ("contiguous", "channels_last")]
FP32, FP32_CL = ALL[0], ALL[1]
TF32 = Candidate(format="tf32")
BF16, BF16_CL = Candidate(format="bf16"), Candidate(format="bf16", memory_format="channels_last")
FP16, FP16_CL = Candidate(format="fp16"), Candidate(format="fp16", memory_format="channels_last")

numbers = st.none() | st.floats(0.01, 1000, allow_nan=False)
failures = st.none() | st.none() | st.sampled_from(Failure)


def steps(**ms: float) -> list[Trial]:
    """Trials with whole steps only, by evidence key."""
    by_key = {candidate.key: candidate for candidate in ALL}
    return [Trial(candidate=by_key[key], step_ms=value) for key, value in ms.items()]


def layers(**ms: float) -> list[Trial]:
    return [replace(trial, step_ms=None, layers_ms=trial.step_ms) for trial in steps(**ms)]


@st.composite
def any_trials(draw: st.DrawFn) -> list[Trial]:
    """Trials of plain FP32 and some others with any numbers, missing ones and failures."""
    chosen = draw(st.lists(st.sampled_from(ALL[1:]), unique=True))
    result = []
    for candidate in [FP32, *chosen]:
        failure = draw(failures)
        step_ms = None if failure else draw(numbers)
        result.append(Trial(candidate=candidate, layers_ms=draw(numbers), step_ms=step_ms, failure=failure))
    return draw(st.permutations(result))


@given(any_trials())
def test_nothing_below_fp32_wins_unless_a_number_says_it_is_faster(trials: list[Trial]) -> None:
    by_candidate = {trial.candidate: trial for trial in trials}
    verdict = decide(trials)
    chosen, plain = by_candidate[verdict.candidate], by_candidate[FP32]
    if chosen.is_fp32 or any(t.is_fp32 and t.failure is Failure.DOES_NOT_FIT for t in trials) or plain.failure:
        return
    if plain.step_ms is not None:
        assert chosen.step_ms is not None
        assert chosen.step_ms < plain.step_ms
    else:
        assert plain.layers_ms is None or (chosen.layers_ms is not None and chosen.layers_ms * TIE < plain.layers_ms)
    for trial in trials:
        if trial.is_fp32 and trial.step_ms is not None and not trial.failure and chosen.step_ms is not None:
            assert chosen.step_ms < trial.step_ms


@given(any_trials())
def test_a_failed_candidate_wins_only_if_all_failed(trials: list[Trial]) -> None:
    by_candidate = {trial.candidate: trial for trial in trials}
    chosen = by_candidate[decide(trials).candidate]
    starved = {trial.candidate.format for trial in trials if trial.failure is Failure.DOES_NOT_FIT}
    others = [t for t in trials if not t.failure and (t.step_ms is not None or t.candidate.format not in starved)]
    assert chosen.failure is None or not others


@given(any_trials())
def test_the_choice_does_not_hang_on_the_order_of_the_trials(trials: list[Trial]) -> None:
    assert decide(trials).candidate == decide(list(reversed(trials))).candidate


@given(st.lists(st.tuples(st.sampled_from(ALL), st.floats(1, 1000)), unique_by=lambda pair: pair[0], min_size=1))
def test_with_all_steps_timed_the_winner_is_within_the_tie_of_the_fastest(timed: list[tuple[Candidate, float]]) -> None:
    times = dict(timed)
    times.setdefault(FP32, 500.0)
    verdict = decide(Trial(candidate=candidate, step_ms=ms) for candidate, ms in times.items())
    assert times[verdict.candidate] <= TIE * min(times.values())


@pytest.mark.parametrize(
    ("trials", "winner"),
    [
        (steps(fp32=100, bf16=101), FP32),
        (steps(fp32=100, bf16=99), FP32),
        (steps(fp32=100, bf16=97), BF16),
        (steps(fp32=100, bf16=50, fp16=49.5), BF16),
        (steps(fp32=100, bf16=50, fp16=45), FP16),
        (steps(fp32=100, bf16=50, bf16_channels_last=49.5), BF16),
        (steps(fp32=100, bf16=50, bf16_channels_last=40), BF16_CL),
        (steps(fp32=100, fp32_channels_last=80, bf16=90), FP32_CL),
        (steps(fp32=100, tf32=50, bf16=49.5), TF32),
        (steps(fp32=100, bf16_channels_last=50, fp16=49.5), BF16_CL),
    ],
    ids=str,
)
def test_the_fastest_wins_and_ties_go_to_the_preferred(trials: list[Trial], winner: Candidate) -> None:
    assert decide(trials).candidate == winner


@pytest.mark.parametrize(
    ("trials", "winner", "reason"),
    [
        (steps(fp32=100, bf16=50), BF16, Reason.MEASURED_FASTEST),
        (steps(fp32=50, bf16=100), FP32, Reason.MEASURED_SLOWER),
        (layers(fp32=100, bf16=50), BF16, Reason.MEASURED_FASTEST),
        (layers(fp32=50, bf16=100), FP32, Reason.MEASURED_SLOWER),
        ([Trial(candidate=FP32), Trial(candidate=BF16)], FP32, Reason.RECOMMENDED),
        ([*steps(fp32=1), Trial(candidate=BF16, failure=Failure.ERROR)], FP32, Reason.NO_KERNEL),
        ([*steps(fp32=1), Trial(candidate=BF16, failure=Failure.DOES_NOT_FIT)], FP32, Reason.DOES_NOT_FIT),
        ([*steps(fp32=1), Trial(candidate=BF16, failure=Failure.NOT_FINITE)], FP32, Reason.MEASURED_SLOWER),
        ([*steps(bf16=1), Trial(candidate=FP32, failure=Failure.DOES_NOT_FIT)], BF16, Reason.MEASURED_FASTEST),
        (
            [Trial(candidate=BF16), Trial(candidate=FP32, failure=Failure.DOES_NOT_FIT)],
            BF16,
            Reason.DOES_NOT_FIT,
        ),
    ],
)
def test_each_outcome_has_its_reason(trials: list[Trial], winner: Candidate, reason: Reason) -> None:
    verdict = decide(trials)
    assert (verdict.candidate, verdict.reason) == (winner, reason)


def test_the_detail_names_the_numbers_and_the_error() -> None:
    failed = Trial(candidate=BF16, failure=Failure.ERROR, detail="RuntimeError: no such kernel")
    detail = decide([*steps(fp32=12.34, fp16=20), failed]).detail
    assert "fp32 12.3 ms" in detail
    assert "bf16: error" in detail
    assert "RuntimeError: no such kernel" in decide([*steps(fp32=12.34), failed]).detail


def test_when_nothing_fits_the_leanest_that_only_lacked_memory_is_kept() -> None:
    trials = [
        Trial(candidate=FP32, failure=Failure.DOES_NOT_FIT),
        Trial(candidate=BF16, failure=Failure.DOES_NOT_FIT),
        Trial(candidate=FP16, failure=Failure.ERROR),
    ]
    verdict = decide(trials)
    assert (verdict.candidate, verdict.reason) == (BF16, Reason.DOES_NOT_FIT)


def test_a_step_counts_without_fp32s_step_only_if_its_layers_beat_fp32() -> None:
    fp32 = Trial(candidate=FP32, layers_ms=100)
    loses = Trial(candidate=BF16, layers_ms=99, step_ms=10)
    wins = Trial(candidate=FP16, layers_ms=60, step_ms=90)
    assert decide([fp32, loses]).candidate == FP32
    assert decide([fp32, loses, wins]).candidate == FP16


def test_out_of_memory_rules_a_format_out_in_both_memory_formats() -> None:
    trials = [*layers(fp32=100, bf16=50, fp16=60), Trial(candidate=BF16_CL, failure=Failure.DOES_NOT_FIT)]
    assert next_trial(trials, coverage=1.0) == FP16
    assert decide(trials).candidate == FP16


def tried(trials: list[Trial], step_ms: dict[str, float], seconds: float, coverage: float = 1.0) -> list[str]:
    """The order in which whole steps are tried, when each takes `seconds` and its given time."""
    known = {trial.candidate: trial for trial in trials}
    order = []
    while (candidate := next_trial(known.values(), coverage=coverage)) is not None:
        order.append(candidate.key)
        known[candidate] = replace(known[candidate], step_ms=step_ms.get(candidate.key, 1.0), seconds=seconds)
    return order


@pytest.mark.parametrize(
    ("ms", "seconds", "coverage", "order"),
    [
        # FP32 is 3x slower and its trial would be long: its layers are evidence enough.
        ({"fp32": 90, "tf32": 40, "bf16": 30, "fp16": 31}, 10.0, 1.0, ["bf16", "fp16"]),
        ({"fp32": 90, "bf16": 30}, 10.0, 1.0, ["bf16"]),
        # As slow, but quickly tried.
        ({"fp32": 90, "bf16": 30, "fp16": 31}, CHEAP_S / 4, 1.0, ["bf16", "fp32", "fp16"]),
        # As slow, but layers stand for too little of the model.
        ({"fp32": 90, "bf16": 30, "fp16": 31}, 10.0, 0.3, ["bf16", "fp32", "fp16"]),
        # Not clearly slower.
        ({"fp32": 40, "bf16": 30, "fp16": 31}, 10.0, 1.0, ["bf16", "fp32", "fp16"]),
        # FP32 is best by layers, so it and the next best are tried.
        ({"fp32": 10, "bf16": 30, "fp16": 31}, 10.0, 1.0, ["fp32", "bf16"]),
        # FP32 in channels_last does not stand for plain FP32.
        ({"fp32": 12, "fp32_channels_last": 9, "bf16": 10}, 10.0, 1.0, ["fp32_channels_last", "fp32", "bf16"]),
    ],
)
def test_the_two_best_by_layers_are_tried_and_fp32_where_it_may_win(
    ms: dict[str, float], seconds: float, coverage: float, order: list[str]
) -> None:
    assert tried(layers(**ms), {}, seconds, coverage) == order


def test_without_layer_timings_every_candidate_is_tried() -> None:
    assert tried([Trial(candidate=c) for c in (FP16, BF16, FP32)], {}, 1.0) == ["fp32", "bf16", "fp16"]


@given(any_trials(), st.data())
def test_trying_ends_and_keeps_the_promise(trials: list[Trial], data: st.DataObject) -> None:
    known = {trial.candidate: replace(trial, step_ms=None) for trial in trials}
    for _ in range(len(known) + 1):
        candidate = next_trial(known.values(), coverage=data.draw(st.floats(0, 1)))
        if candidate is None:
            break
        failure = data.draw(failures)
        step_ms = None if failure else data.draw(st.floats(0.01, 1000))
        known[candidate] = replace(known[candidate], step_ms=step_ms, failure=failure, seconds=1.0)
    else:
        pytest.fail("next_trial asked for a candidate twice")
    chosen, plain = known[decide(known.values()).candidate], known[FP32]
    assert chosen.is_fp32 or plain.step_ms is None or (chosen.step_ms or 0) < plain.step_ms


def test_a_trial_is_expected_to_take_as_long_as_the_longest_and_longer_if_its_layers_are() -> None:
    slow = replace(layers(fp32=100)[0])
    done = Trial(candidate=BF16, layers_ms=20, step_ms=30, seconds=2.0)
    assert expected_seconds([slow, done], FP32) == pytest.approx(10.0)
    assert expected_seconds([slow, done, Trial(candidate=FP16)], FP16) == pytest.approx(2.0)
    assert expected_seconds([slow], FP32) == 0.0
