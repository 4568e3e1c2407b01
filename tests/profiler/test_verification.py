"""Rank correlation against SciPy's, and true changes of a model."""

from statistics import mean, stdev

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from deepseek_mp.profiler.verification import rank_correlation, true_changes


@pytest.mark.parametrize("seed", range(5))
def test_ranks_agree_with_scipy_also_with_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 5, (20,), generator=generator).tolist()
    b = torch.randint(0, 5, (20,), generator=generator).tolist()
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b)[0])


def test_too_few_or_equal_values_have_none():
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_changes_are_by_unit_and_recipe():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), torch.randn(8, 16)
    changes = true_changes(
        [lambda: model(x).square().mean()], {"0": model[0], "1": model[1]}, {"0": ["bf16", "fp32"], "1": ["nvfp4"]}
    )
    assert changes["0"]["fp32"].mean == 0
    assert changes["0"]["bf16"].mean != 0
    assert changes["0"]["bf16"].standard_error is None
    assert not changes["0"]["bf16"].is_plain
    assert set(changes["1"]) == {"nvfp4"}


def test_several_batches_say_how_sure_a_change_is():
    model, batches = nn.Sequential(nn.Linear(16, 16)), torch.randn(8, 32, 16)
    losses = [lambda x=x: model(x).square().mean() for x in batches]
    found = true_changes(losses, {"0": model[0]}, {"0": ["nvfp4"]})["0"]["nvfp4"]
    alone = [true_changes([loss], {"0": model[0]}, {"0": ["nvfp4"]})["0"]["nvfp4"].mean for loss in losses]
    assert found.mean == pytest.approx(mean(alone))
    assert found.standard_error == pytest.approx(stdev(alone) / 8**0.5)
    assert found.is_plain == (abs(found.mean) > 2 * found.standard_error)
