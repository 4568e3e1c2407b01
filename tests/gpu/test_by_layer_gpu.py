"""Kinds by layer and forms by size on a GPU: everything is measured there, and no memory is kept."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from deepseek_mp.inference import optimize_for_inference, optimize_for_shapes
from deepseek_mp.inference.layer_times import Shape, layer_times
from deepseek_mp.inference.quantised_linear import linear_kinds

DEVICE, BF16 = torch.device("cuda"), torch.bfloat16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def model():
    layers = [nn.Sequential(nn.Linear(2048, 4096), nn.GELU(), nn.Linear(4096, 2048)) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(2048, 1024)).to(DEVICE).eval()


def held():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("rows", [1, 64])
def test_each_kind_of_the_device_is_timed(model, rows):
    kinds = linear_kinds(model, BF16, DEVICE)
    shape, before = Shape(4096, 2048, rows, True), held()
    found = layer_times({shape: kinds}, BF16, DEVICE, seconds=5.0, others=2**28)[shape]
    assert found.problems == {}
    assert set(found.kinds) == set(kinds)
    assert found.plain > 0
    assert all(seconds > 0 for seconds in found.kinds.values())
    del found
    assert held() == before


def test_layers_are_chosen_within_the_budget_and_nothing_is_kept(model):
    x = torch.randn(1, 2048, device=DEVICE)
    optimize_for_inference(model, x, compile=False, seconds=0.0, layer_seconds=5.0)  # libraries keep working memory
    before = held()
    found = optimize_for_inference(model, x, compile=False, seconds=0.1, layer_seconds=5.0)
    assert len(found.plan.layers.choices) == 7, found.plan.layers.why
    for trial in found.plan.trials:
        assert not (trial.form.layers and trial.problem), trial.problem
        assert not trial.form.layers or trial.error <= found.plan.budget
    del found, trial
    assert held() == before


def test_sizes_share_weights(model):
    few, many = torch.randn(1, 2048, device=DEVICE), torch.randn(256, 2048, device=DEVICE)
    served, plans, _ = optimize_for_shapes(model, [few, many], compile=False, seconds=0.1, layer_seconds=2.0)
    for x in (few, many, torch.randn(40, 2048, device=DEVICE)):
        with torch.no_grad():
            torch.testing.assert_close(served(x), model(x), rtol=0.1, atol=0.1)
    assert list(plans) == ["1x2048", "256x2048"]
