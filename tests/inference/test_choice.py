"""The choice, from numbers that the tests make up."""

import pytest

from deepseek_mp.inference import Form, Latency, Trial, choose

FP32, BF16, FP16 = Form(), Form(format="bf16"), Form(format="fp16")


def trial(form, ms=1.0, error=0.0, **others):
    return Trial(form=form, latency=Latency(median_ms=ms, p95_ms=ms, runs=9), error=error, **others)


def reasons(trials, budget=1e-3):
    form, explained = choose(trials, budget)
    return form, [one.why for one in explained]


def test_the_fastest_within_the_budget_is_taken():
    form, why = reasons([trial(FP32, 4.0), trial(BF16, 2.0, 1e-4), trial(FP16, 1.0, 1e-2)])
    assert form == BF16
    assert why[0] == "2 times the time of bf16"
    assert why[1] == "taken: 2 times as fast as fp32, error 0.0001 within 0.001"
    assert why[2] == "error 0.01 is beyond the budget of 0.001"


def test_of_equals_the_first_is_taken():
    assert reasons([trial(FP32, 1.02), trial(BF16, 1.0)])[0] == FP32
    assert reasons([trial(FP32, 1.05), trial(BF16, 1.0)])[0] == BF16


def test_an_equal_that_is_faster_and_is_not_taken_says_why():
    form, why = reasons([trial(FP32, 1.02), trial(BF16, 1.0)])
    assert form == FP32
    assert why[0] == "taken: no other form within 0.001 is more than 3% faster"
    assert why[1] == "0.98 times the time of fp32, which counts as equal and was tried before"


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 1.0])
def test_fp32_is_always_left(error):
    assert reasons([trial(FP32, 4.0), trial(BF16, 1.0, error)])[0] == FP32


def test_what_has_a_problem_says_so():
    broken = Trial(form=FP16, problem="RuntimeError: not implemented for 'Half'")
    assert reasons([trial(FP32), broken])[1][1] == broken.problem
    assert reasons([trial(FP32), Trial(form=BF16, error=0.0)])[1][1] == "not timed"


def test_json_has_every_number():
    found = trial(BF16, 2.0, 1e-4, weight_bytes=10, peak_bytes=20).to_json()
    assert found["name"] == "bf16"
    assert found["latency"] == {"median_ms": 2.0, "p95_ms": 2.0, "runs": 9}
    assert (found["error"], found["weight_bytes"], found["peak_bytes"], found["energy"]) == (1e-4, 10, 20, None)
