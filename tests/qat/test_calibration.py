"""Calibration widens ranges without rounding, training or touching statistics, and refuses bad data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError, LoaderError
from deepseek_mp.qat import calibrate, prepare

X = (torch.arange(32.0) * 7 % 32 / 16 - 1).view(4, 8)
"""From -1 to 15/16, each step of 1/16 once."""


@pytest.fixture
def linear():
    return prepare(nn.Sequential(nn.Linear(8, 4)), X)


def observer_of(simulated):
    return next(q for q in simulated.quantisers() if not q.is_per_channel).activation_post_process


@pytest.mark.parametrize("example", [torch.zeros(2, 8), X * 100], ids=["zeros", "large"])
def test_ranges_are_those_of_the_data_whatever_the_example_was(example):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    simulated = prepare(model, example)
    assert calibrate(simulated, [(X * 2, None), X * 4]) == 2
    torch.testing.assert_close(observer_of(simulated).max_val, X.max() * 3)  # the mean of both batches
    found, expected = simulated.eval()(X), model(X)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_later_batches_change_ranges_as_training_does(linear):
    calibrate(linear, [X])
    linear(X * 2)
    torch.testing.assert_close(observer_of(linear).max_val, X.max() * 1.01)


@pytest.mark.parametrize("batches", [[], [X * 9, X * math.nan]], ids=["none", "NaN"])
def test_after_an_error_ranges_are_as_before(linear, batches):
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    with pytest.raises((BatchError, LoaderError), match="calibration with"):
        calibrate(linear, batches)
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())


def test_no_batch_and_bad_batches_are_refused(linear):
    with pytest.raises(LoaderError, match="calibration without a batch"):
        calibrate(linear, [])
    with pytest.raises(BatchError, match="NaN or infinite values in batch 1"):
        calibrate(linear, [X, X * math.nan])
    assert linear.training
    assert all(quantiser.fake_quant_enabled for quantiser in linear.quantisers())


@pytest.mark.parametrize("one", [X, {"input": X}])
def test_one_batch_in_place_of_a_list_is_refused(linear, one):
    with pytest.raises(LoaderError, match=r"which is one batch\. .* Pass it in a list"):
        calibrate(linear, one)


@pytest.mark.parametrize("passed", [3, True, "data", len])
def test_what_holds_no_batches_is_refused(linear, passed):
    with pytest.raises(LoaderError, match=r"calibration=.*\. Allowed: batches: a list of them, or a loader"):
        calibrate(linear, passed)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (X.double(), r"calibration with a batch 1 that the model does not take \(RuntimeError: "),
        (X[:, :5], "input input"),
    ],
)
def test_a_batch_that_the_model_does_not_take_is_refused(linear, batch, match):
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    with pytest.raises(BatchError, match=match):
        calibrate(linear, [X * 9, batch])
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())


def test_batches_without_samples_count_for_nothing(linear):
    empty = X[:0]
    assert calibrate(linear, [empty, X, (empty, None), X * 3]) == 2
    torch.testing.assert_close(observer_of(linear).max_val, X.max() * 2)
    with pytest.raises(LoaderError, match="calibration without a batch"):
        calibrate(linear, [empty, empty])
    with pytest.raises(BatchError, match="in batch 2"):
        calibrate(linear, [X, empty, X * math.nan])
