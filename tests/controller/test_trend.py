"""The course of the loss: slopes, jumps, and no false alarm."""

import json
import math
import random

import pytest

from deepseek_mp.controller.trend import LossTrend


def run(losses, trend=None):
    trend = trend or LossTrend()
    return trend, [step for step, loss in enumerate(losses) if trend.see(step, loss)]


def noisy(count, level=2.0, noise=0.05, seed=0):
    generator = random.Random(seed)
    return [level * math.exp(generator.gauss(0, noise)) for _ in range(count)]


def test_a_jump_is_seen_in_its_second_step():
    _, jumps = run([*noisy(100), 6.0, 6.0])
    assert jumps == [101]


def test_one_bad_batch_is_no_jump():
    _, jumps = run([*noisy(100), 6.0, *noisy(20, seed=1)])
    assert jumps == []


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3, 0.6])
def test_noise_is_no_jump(noise):
    _, jumps = run([loss for seed in range(3) for loss in noisy(700, noise=noise, seed=seed)])
    assert jumps == []


def test_a_falling_loss_is_no_jump_and_has_a_slope():
    trend, jumps = run([5.0 - 0.001 * step for step in range(2000)])
    assert jumps == []
    assert trend.slope().fall == pytest.approx(0.001, rel=0.01)
    assert trend.slope().error < 1e-6


def test_a_flat_loss_has_almost_no_slope():
    trend, _ = run(noisy(3000, noise=0.02))
    assert abs(trend.slope().fall) < 1e-4


@pytest.mark.parametrize("seed", range(8))
def test_the_error_of_a_slope_covers_the_scatter_of_batches(seed):
    """After 200 steps the fall is lost in the noise: what it truly is lies within three standard errors."""
    losses = [loss - 0.001 * step for step, loss in enumerate(noisy(200, level=3.0, noise=0.1, seed=seed))]
    slope = run(losses)[0].slope()
    assert slope.fall - 3 * slope.error < 0.001 < slope.fall + 3 * slope.error


def test_nothing_is_known_at_first():
    trend, jumps = run([1.0, 100.0, 100.0])
    assert trend.slope() is None
    assert jumps == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, -1.0])
def test_losses_that_say_nothing_are_passed_over(loss):
    trend, _ = run(noisy(50))
    before = trend.state_dict()
    assert not trend.see(50, loss)
    assert trend.state_dict() == before


def test_a_restored_trend_goes_on_as_before():
    trend, _ = run(noisy(300))
    again = LossTrend()
    again.load_state_dict(json.loads(json.dumps(trend.state_dict())))
    more = [*noisy(50, seed=4), 9.0, 9.0]
    assert run(more, trend)[1] == run(more, again)[1]
    assert trend.slope() == again.slope()
