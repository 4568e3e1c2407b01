"""The metric with some layers in other kinds: exactly that of the form with them, and nothing stays behind."""

import copy
import math

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, Served, kl
from deepseek_mp.inference.layer_errors import LayerErrors

CPU = torch.device("cpu")


class Counts(nn.Module):
    """Adds how often it was called to its outputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.times = 0
        self.layers = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))

    def forward(self, x):
        self.calls += 1
        self.times += 1
        return self.layers(x) * self.calls


@pytest.fixture
def model():
    return Counts()


def errors(model, served, x, metric=kl):
    reference = copy.deepcopy(model)(x).detach()
    return LayerErrors(
        model, served.model, lambda: served(x), reference=reference, metric=metric, dtype=torch.bfloat16, device=CPU
    )


def test_it_is_the_error_of_the_form_with_these_layers(model):
    x, served = torch.randn(4, 256), Served(model, Form(format="bf16"), CPU)
    own = list(served.model.named_modules())
    found = errors(model, served, x)
    for kinds in ({}, {"layers.0": "int8_weights"}, {"layers.0": "int8_weights", "layers.2": "int4_weights"}):
        form = Form(format="bf16", layers=tuple(kinds.items()))
        expected = kl(Served(model, form, CPU)(x), copy.deepcopy(model)(x).detach())
        assert found.error(kinds) == pytest.approx(expected, rel=1e-12)
    assert found.looks == 3
    assert [(name, id(module)) for name, module in served.model.named_modules()] == [(n, id(m)) for n, m in own]
    assert (float(served.model.calls), served.model.times) == (0, 0)
    assert (float(model.calls), model.times) == (0, 0)


def test_nothing_stays_behind_after_an_exception(model):
    x, served = torch.randn(4, 256), Served(model, Form(format="bf16"), CPU)
    own = served.model.layers[0]
    found = errors(model, served, x)
    found._call = lambda: [served(x), 1 / 0]
    with pytest.raises(ZeroDivisionError, match="division"):
        found.error({"layers.0": "int8_weights"})
    assert served.model.layers[0] is own
    assert float(served.model.calls) == 0
    with torch.no_grad():
        model.layers[0].weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"weight of 'layers\.0' with values that are not finite"):
        found.error({"layers.0": "int8_weights"})


def test_what_is_no_number_is_infinite(model):
    x, served = torch.randn(4, 256), Served(model, Form(format="bf16"), CPU)
    assert errors(model, served, x, metric=lambda outputs, reference: math.nan).error({}) == math.inf


def test_outputs_that_are_not_finite_are_infinitely_far(model):
    x, served = torch.randn(4, 256), Served(model, Form(format="bf16"), CPU)
    served.model.calls.fill_(math.inf)
    assert errors(model, served, x, metric=lambda outputs, reference: 0.0).error({}) == math.inf
