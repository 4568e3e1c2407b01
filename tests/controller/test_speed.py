"""What a change of plan did to the step's time, with made-up times."""

import random

import pytest

from deepseek_mp.controller.adaptive_units import AdaptiveUnit
from deepseek_mp.controller.speed import SETTLING, WINDOW, SpeedCheck, to_compile


def steps(check, seconds, promised, count=WINDOW + SETTLING, scatter=0.0):
    draw = random.Random(0)
    found = [check.see(seconds * (1 + scatter * draw.gauss(0, 1)), promised) for _ in range(count)]
    return [gain for gain in found if gain is not None]


def test_a_step_that_became_faster_as_promised_kept_all_of_it():
    check = SpeedCheck()
    assert steps(check, 0.060, 0.0) == []
    (gain,) = steps(check, 0.050, 0.010)
    assert gain.kept == pytest.approx(1.0)
    assert gain.evidence == pytest.approx(
        {"before_ms": 60.0, "after_ms": 50.0, "promised_ms": 10.0, "saved_ms": 10.0, "steps": WINDOW}
    )


def test_a_step_that_became_slower_kept_less_than_nothing():
    check = SpeedCheck()
    steps(check, 0.033, 0.0, scatter=0.02)
    (gain,) = steps(check, 0.034, 0.005, scatter=0.02)
    assert gain.kept == pytest.approx(-0.2, abs=0.1)


def test_raising_tells_the_same_backwards():
    check = SpeedCheck()
    steps(check, 0.050, 0.010)
    (gain,) = steps(check, 0.055, 0.0)
    assert gain.kept == pytest.approx(0.5)


def test_steps_right_after_a_change_do_not_count():
    check = SpeedCheck()
    steps(check, 0.060, 0.0)
    assert steps(check, 9.0, 0.010, SETTLING) == []
    (gain,) = steps(check, 0.050, 0.010, WINDOW)
    assert gain.after.seconds == 0.050


def test_what_a_change_costs_is_what_the_steps_after_it_took_more():
    check = SpeedCheck()
    steps(check, 0.060, 0.0)
    steps(check, 2.0, 0.010, 2)
    steps(check, 0.050, 0.010, WINDOW + SETTLING - 2)
    assert check.switch == pytest.approx(2 * (2.0 - 0.060))
    steps(check, 0.060, 0.0)
    assert check.switch == pytest.approx(SETTLING * 0.010), "of the last change only"


def test_a_window_with_a_change_in_it_is_dropped():
    check = SpeedCheck()
    steps(check, 0.060, 0.0)
    assert steps(check, 9.0, 0.010, WINDOW + SETTLING - 1) == []
    (gain,) = steps(check, 0.050, 0.020)
    assert gain.before.seconds == 0.060
    assert gain.kept == pytest.approx(0.5)


@pytest.mark.parametrize(("promised", "scatter"), [(0.0001, 0.0), (0.003, 0.3), (0.0, 0.0)])
def test_what_cannot_be_told_is_not_said(promised, scatter):
    check = SpeedCheck()
    steps(check, 0.060, 0.0, scatter=scatter)
    assert steps(check, 0.061, promised, scatter=scatter) == []


def test_blocks_are_compiled_for_what_is_not_all_in_the_base():
    units = {
        name: AdaptiveUnit(macs=1.0, seconds={}, recipes=("row",), inputs=1, block=block)
        for name, block in (("one.a", "one"), ("one.b", "one"), ("two.a", "two"), ("head", ""))
    }
    base = dict.fromkeys(units, "bf16")
    assert to_compile(units, base, ["one.a", "head"], "bf16") == 0
    assert to_compile(units, base | {"one.b": "row"}, ["one.a"], "bf16") == 1
    assert to_compile(units, base | {"one.b": "row"}, ["two.a"], "bf16") == 0
    assert to_compile(units, base | {"one.a": "row", "head": "row"}, ["one.a", "one.b", "head"], "bf16") == 2
