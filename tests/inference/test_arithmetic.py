"""What a caller has switched on does not change how a served model computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp import inference, optimize_for_inference
from deepseek_mp.inference import Form, Served

CPU = torch.device("cpu")


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.mark.parametrize("format", ["fp32", "fp16"])
def test_a_form_computes_in_its_own_format_under_autocast(model, format):
    served, x = Served(model, Form(format=format), CPU), torch.randn(4, 16)
    expected = served(x)
    with autocast():
        assert torch.equal(served(x), expected)


def test_the_budget_is_on_the_distance_to_fp32_under_autocast(model):
    x = torch.randn(4, 16)
    with autocast():
        plan = optimize_for_inference(model, x, compile=False, seconds=0.01, layer_seconds=0, metric="relative").plan
    errors = {trial.form.name: trial.error for trial in plan.trials}
    assert errors["fp32"] == 0
    assert errors["bf16"] > 1e-4


def test_a_file_that_was_saved_and_called_under_autocast_is_the_served_model(model, tmp_path):
    served, x = Served(model, Form(format="fp32"), CPU), torch.randn(4, 16)
    with autocast():
        served.save(tmp_path / "model.pt2", x)
        loaded = inference.load(tmp_path / "model.pt2", CPU)
        inside = loaded(x)
    assert torch.equal(inside, served(x))
    assert torch.equal(loaded(x), served(x))
