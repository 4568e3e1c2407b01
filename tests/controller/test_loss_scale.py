"""Every policy against a plain model of its rule, its bounds, and its saved state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_mp.controller import (
    DynamicLossScale,
    LossScalePolicy,
    NoLossScale,
    PredictiveLossScale,
    StaticLossScale,
    make_policy,
)
from deepseek_mp.errors import ConfigError, LossScaleError

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def scale_after(policy: LossScalePolicy, outcomes: list[bool], amax: float = 1.0) -> list[float]:
    scales = []
    for good in outcomes:
        policy.update(GOOD if good else BAD, torch.tensor(amax))
        scales.append(float(policy.scale))
    return scales


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_dynamic_follows_the_rule_step_by_step(outcomes, interval):
    policy = DynamicLossScale(2.0**10, interval=interval, floor=2.0**-3, ceiling=2.0**13)
    scale, good_steps, expected = 2.0**10, 0, []
    for good in outcomes:
        if good:
            good_steps += 1
            if good_steps == interval:
                scale, good_steps = min(scale * 2, 2.0**13), 0
        else:
            scale, good_steps = max(scale / 2, 2.0**-3), 0
        expected.append(scale)
    assert scale_after(policy, outcomes) == expected


def test_dynamic_equals_the_scaler_of_pytorch_inside_the_bounds():
    outcomes = [True] * 7 + [False] * 3 + [True] * 9 + [False, True, True, True, False]
    policy = DynamicLossScale(2.0**16, interval=3)
    theirs, param = torch.amp.GradScaler("cpu", growth_interval=3), torch.nn.Parameter(torch.ones(1))
    optimizer, expected = torch.optim.SGD([param], lr=0.0), []
    for good in outcomes:
        theirs.scale(torch.ones(()))
        param.grad = torch.full((1,), 0.0 if good else float("inf"))
        theirs.step(optimizer)
        theirs.update()
        expected.append(theirs.get_scale())
    assert scale_after(policy, outcomes) == expected


@pytest.mark.parametrize("policy", [DynamicLossScale(), PredictiveLossScale()], ids=["dynamic", "predictive"])
def test_scale_stays_finite_positive_and_inside_its_bounds_for_ever(policy):
    falling = scale_after(policy, [False] * 400)
    assert min(falling) == policy.floor == falling[-1]
    rising = scale_after(policy, [True] * 200, amax=0.0)
    assert all(math.isfinite(s) and policy.floor <= s <= policy.ceiling for s in rising)


def test_dynamic_stops_at_its_ceiling_on_a_long_quiet_run():
    assert scale_after(DynamicLossScale(interval=1), [True] * 200)[-1] == 2.0**24


def test_predictive_keeps_the_largest_gradient_its_headroom_below_overflow():
    policy = PredictiveLossScale(headroom=16.0)
    for true_amax in (3.0, 3e-4, 2e-7, 5e-2):
        policy = PredictiveLossScale(headroom=16.0)
        for _ in range(3):
            policy.update(GOOD, torch.tensor(true_amax) * policy.scale)
        top = true_amax * float(policy.scale)
        if float(policy.scale) < policy.ceiling:
            assert 65504 / 32 / 1.001 <= top <= 65504 / 16


def test_predictive_overflows_less_often_than_probing_where_gradients_drift():
    """Gradients rise and fall by a factor of 64; a step overflows when its scaled amax leaves fp16."""
    sizes = [2.0 ** (-12 + 6 * math.sin(i / 150)) for i in range(4000)]

    def overflows(policy):
        lost = 0
        for size in sizes:
            scaled = size * float(policy.scale)
            bad = scaled > 65504
            lost += bad
            policy.update(BAD if bad else GOOD, torch.tensor(float("inf") if bad else scaled))
        return lost

    dynamic, predictive = overflows(DynamicLossScale(interval=100)), overflows(PredictiveLossScale())
    assert predictive == 0
    assert dynamic >= 10


def test_predictive_widens_its_headroom_where_inner_gradients_overflow_first():
    """Gradients inside the model are 100x those of the parameters: only the overflow itself tells."""
    policy, lost = PredictiveLossScale(), 0
    for _ in range(300):
        scaled = 1e-3 * float(policy.scale)
        bad = scaled * 100 > 65504
        lost += bad
        policy.update(BAD if bad else GOOD, torch.tensor(float("nan") if bad else scaled))
    assert 1 <= lost <= 4


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True, "8"])
def test_a_scale_that_is_no_positive_number_is_refused(value):
    with pytest.raises(LossScaleError, match="initial="):
        DynamicLossScale(value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"backoff": 0.0}, {"backoff": -0.5}, {"backoff": 1.0}, {"growth": 1.0}, {"growth": float("nan")},
        {"growth": float("inf")}, {"interval": 0}, {"interval": -3}, {"interval": 1.5},
        {"floor": 0.0}, {"floor": float("nan")}, {"ceiling": float("inf")}, {"ceiling": 1e-30},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(LossScaleError, match=f"{next(iter(arguments))}="):
        DynamicLossScale(**arguments)
    if "backoff" not in arguments and "growth" not in arguments:
        with pytest.raises(LossScaleError, match=f"{next(iter(arguments))}="):
            PredictiveLossScale(**arguments)


def test_state_survives_json_and_continues_identically():
    outcomes = [True, True, False, True] * 5
    for make in (lambda: DynamicLossScale(interval=3), PredictiveLossScale):
        first, second = make(), make()
        scale_after(first, outcomes, amax=0.3)
        second.load_state_dict(first.state_dict())
        assert scale_after(first, outcomes, amax=0.7) == scale_after(second, outcomes, amax=0.7)


@pytest.mark.parametrize("scale", [0.0, -5.0, float("nan"), float("inf"), 2.0**30, "1"])
def test_loading_an_invalid_scale_changes_nothing(scale):
    policy = DynamicLossScale(4.0)
    with pytest.raises(LossScaleError, match="scale="):
        policy.load_state_dict({"policy": "dynamic", "scale": scale, "good_steps": 1})
    assert policy.state_dict() == DynamicLossScale(4.0).state_dict()


def test_loading_an_incomplete_state_changes_nothing():
    policy = DynamicLossScale(4.0)
    with pytest.raises(LossScaleError, match="good_steps"):
        policy.load_state_dict({"policy": "dynamic", "scale": 8.0})
    assert float(policy.scale) == 4.0


def test_state_of_another_policy_is_refused_both_ways():
    with pytest.raises(LossScaleError, match="'none'"):
        DynamicLossScale().load_state_dict(NoLossScale().state_dict())
    with pytest.raises(LossScaleError, match="'dynamic'"):
        NoLossScale().load_state_dict(DynamicLossScale().state_dict())


def test_a_floor_raised_later_lifts_the_scale():
    policy = DynamicLossScale(2.0**-14)
    policy.raise_floor(2.0**-4)
    assert float(policy.scale) == 2.0**-4
    assert scale_after(policy, [False] * 5)[-1] == 2.0**-4


def test_make_policy_takes_names_numbers_and_policies():
    assert isinstance(make_policy("dynamic"), DynamicLossScale)
    assert isinstance(make_policy("predictive"), PredictiveLossScale)
    assert isinstance(make_policy("none"), NoLossScale)
    assert float(make_policy(128).scale) == 128.0
    own = StaticLossScale(2.0)
    assert make_policy(own) is own


@pytest.mark.parametrize("spec", ["dynamc", None, True, object])
def test_make_policy_refuses_anything_else(spec):
    with pytest.raises(ConfigError, match="'dynamic', 'predictive', 'static', 'none'"):
        make_policy(spec)
