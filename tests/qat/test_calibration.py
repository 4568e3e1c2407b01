"""Calibration widens ranges without rounding, training or touching statistics, and refuses bad data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deepseek_mp.errors import BatchError, LoaderError
from deepseek_mp.qat import calibrate, prepare

X = torch.randn(4, 8)


@pytest.fixture
def linear():
    return prepare(nn.Sequential(nn.Linear(8, 4)), X)


def test_ranges_move_towards_the_data(linear):
    observer = next(q for q in linear.quantisers() if not q.is_per_channel).activation_post_process
    before = observer.max_val.clone()
    assert calibrate(linear, [(X * 10, None), X * 10]) == 2
    torch.testing.assert_close(observer.max_val, before * (1 + 9 * (1 - 0.99**2)))
    assert linear.training


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
