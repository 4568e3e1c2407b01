"""A curve is good where it keeps to its baseline's, and the first rule that it breaks is named."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from deepseek_mp.trainer.curves import Limits, Point, judge, judge_baseline, not_finite, smoothed, tail_mean, window
from deepseek_mp.trainer.result import StepFacts

LIMITS = Limits()
STEPS = 100


def curve(loss=lambda step: 1.0, norm=lambda step: 1.0, *, scale=1.0, skipped=(), steps=STEPS):
    return [
        Point(step=step, loss=loss(step), grad_norm=norm(step), scale=scale, applied=step not in skipped)
        for step in range(1, steps + 1)
    ]


def falling(step):
    """A loss with the noise of its batches, which is the same in every run."""
    return 5 * math.exp(-step / 30) + 1 + 0.3 * random.Random(step).random()


def test_a_run_equal_to_its_baseline_is_good():
    verdict = judge(curve(falling), curve(falling), LIMITS)
    assert verdict.good
    assert (verdict.worst_loss, verdict.final_loss, verdict.gradient_ratio, verdict.gradient_growth) == (0.0, 0.0, 1, 1)


@pytest.mark.parametrize(("excess", "good"), [(0.04, True), (0.06, False), (-0.5, True)])
def test_only_a_higher_loss_counts_and_only_beyond_the_tolerance(excess, good):
    verdict = judge(curve(lambda step: falling(step) * (1 + excess)), curve(falling), LIMITS)
    assert verdict.good is good
    assert verdict.worst_loss == pytest.approx(excess)
    assert verdict.final_loss == pytest.approx(excess)
    assert good or "6 % above the baseline's at step" in verdict.reason


def test_a_hump_that_is_gone_at_the_end_is_seen():
    verdict = judge(curve(lambda step: 1.3 if 40 <= step < 60 else 1.0), curve(), LIMITS)
    assert not verdict.good
    assert verdict.worst_step is not None
    assert 45 <= verdict.worst_step < 60
    assert verdict.final_loss == 0.0


def test_a_single_bad_batch_is_smoothed_away():
    assert judge(curve(lambda step: 1.1 if step == 50 else 1.0), curve(), LIMITS).good


def test_the_mean_at_the_end_is_judged_by_itself():
    verdict = judge(curve(lambda step: 1.12 if step > STEPS - 3 else 1.0), curve(), LIMITS)
    assert not verdict.good
    slow = judge(curve(lambda step: 1.054 if step > 95 else 1.0), curve(), Limits(tolerance=0.05))
    assert "the mean loss of the last 5 steps is 5.4 % above" in slow.reason


def test_losses_near_zero_are_measured_by_the_first():
    base = curve(lambda step: 1.0 if step < 10 else 1e-5)
    assert judge(curve(lambda step: 1.0 if step < 10 else 2e-5), base, LIMITS).good
    assert not judge(curve(lambda step: 1.0 if step < 10 else 2e-3), base, LIMITS).good


def test_negative_losses():
    assert judge(curve(lambda step: -1.02), curve(lambda step: -1.0), LIMITS).good
    assert not judge(curve(lambda step: -0.9), curve(lambda step: -1.0), LIMITS).good


def test_a_loss_that_is_not_finite_is_named():
    points = curve(lambda step: math.nan if step == 7 else 1.0, skipped={7})
    points[6] = Point(step=7, loss=math.nan, grad_norm=math.nan, scale=1.0, applied=False, first_bad_module="fc")
    verdict = judge(points, curve(), LIMITS)
    assert not verdict.good
    assert verdict.reason == "the loss is nan at step 7 (first bad module: 'fc'), where the baseline's is finite"
    assert judge(points, curve(lambda step: math.nan if step == 7 else 1.0, skipped={7}), LIMITS).good


def test_gradients_that_are_not_finite_are_forgiven_only_under_a_loss_scale():
    base = curve()
    assert "gradients are not finite at step 3" in not_finite(curve(skipped={3}), base, LIMITS)
    assert not_finite(curve(skipped={3, 4}, scale=1024.0), base, LIMITS) == ""
    many = not_finite(curve(skipped=set(range(20, 40)), scale=1024.0), base, LIMITS)
    assert many == "20 of 100 steps were skipped while a loss scale was looked for"


def test_steps_that_were_skipped_delay_a_run_and_do_not_count_as_a_higher_loss():
    steep = lambda step: 10 * 0.9**step + 1  # noqa: E731
    skipped = {1, 2, 3}
    late = curve(lambda step: steep(step - sum(s < step for s in skipped)), skipped=skipped, scale=2.0)
    assert judge(late, curve(steep), LIMITS).good
    not_skipped = curve(lambda step: steep(max(step - 3, 1)), scale=2.0)
    assert not judge(not_skipped, curve(steep), LIMITS).good


@pytest.mark.parametrize(("ratio", "good"), [(1.9, True), (2.1, False), (0.55, True), (0.45, False)])
def test_gradient_norms_stay_within_a_factor(ratio, good):
    verdict = judge(curve(norm=lambda step: ratio), curve(), LIMITS)
    assert verdict.good is good
    assert verdict.gradient_ratio == ratio
    assert good or "gradient norms are" in verdict.reason


def test_gradient_norms_that_grow_away_are_seen():
    verdict = judge(curve(norm=lambda step: 0.6 * 4 ** (step / STEPS)), curve(), LIMITS)
    assert not verdict.good
    assert "gradient norms grew" in verdict.reason
    both = lambda step: 4 ** (step / STEPS)  # noqa: E731
    assert judge(curve(norm=both), curve(norm=both), LIMITS).good
    assert judge(curve(norm=lambda step: 1.5 * 0.25 ** (step / STEPS)), curve(), LIMITS).good


def test_gradient_norms_that_die_are_seen():
    verdict = judge(curve(norm=lambda step: 1.0 if step <= 0.55 * STEPS else 1e-6), curve(), LIMITS)
    assert not verdict.good
    assert verdict.gradient_ratio == 1.0, "the median over all steps does not tell"
    assert "fell to 1e-06 of what they were" in verdict.reason


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_short_runs_are_judged_too(steps):
    assert judge(curve(steps=steps), curve(steps=steps), LIMITS).good
    assert not judge(curve(lambda step: 1.2, steps=steps), curve(steps=steps), LIMITS).good


def test_curves_that_share_nothing_are_not_good():
    bad = curve(lambda step: math.nan, skipped=range(1, STEPS + 1))
    assert "no step can be compared" in judge([], curve(), LIMITS).reason
    assert not judge(bad, curve(), LIMITS).good


def test_a_gradient_without_a_norm_or_of_zero_is_left_out():
    verdict = judge(curve(norm=lambda step: None), curve(), LIMITS)
    assert (verdict.good, verdict.gradient_ratio) == (True, None)
    assert judge(curve(norm=lambda step: 1.0), curve(norm=lambda step: 0.0), LIMITS).gradient_ratio is None


def test_a_baseline_has_to_end_with_a_loss_and_apply_its_steps():
    assert judge_baseline(curve(falling)).good
    assert "the loss is not finite at step 100" in judge_baseline(curve(lambda step: math.nan)).reason
    assert not judge_baseline([]).good
    assert "only 40 of 100" in judge_baseline(curve(skipped=set(range(1, 61)))).reason


def test_smoothing_has_no_bias_to_its_start():
    assert smoothed([2.0] * 10, 5) == pytest.approx([2.0] * 10)
    values = np.random.default_rng(0).normal(size=50)
    decay = 1 - 2 / 6
    weights = decay ** np.arange(50)
    expected = [(weights[: t + 1] * values[t::-1]).sum() / weights[: t + 1].sum() for t in range(50)]
    assert smoothed(values, 5) == pytest.approx(expected)


def test_the_window_is_a_twentieth():
    assert [window(steps) for steps in (1, 100, 101, 2000)] == [5, 5, 5, 100]
    assert tail_mean(curve(float)) == 98.0
    assert math.isnan(tail_mean([]))


def test_points_are_taken_from_the_facts_of_a_step():
    facts = StepFacts(status="skipped", loss=math.inf, scale=2.0, grad_norm=math.nan, first_bad_module="a")
    point = Point.of(3, facts)
    assert (point.step, point.loss, point.scale, point.applied) == (3, math.inf, 2.0, False)
    assert point.first_bad_module == "a"


def test_a_verdict_is_json():
    assert judge(curve(), curve(), LIMITS).to_json()["good"] is True
