"""`optimize_for_shapes` end to end on a CPU, with latencies of the test's own."""

import copy

import pytest
import torch
from torch import nn

from deepseek_mp import optimize_for_shapes
from deepseek_mp.costs.memory import distinct_bytes
from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, Latency, optimize, optimize_shapes


@pytest.fixture
def fastest(monkeypatch):
    """By size, in the order they are asked for, the name of the fastest form."""
    names = []

    def latencies(calls, device, *, seconds):
        name = names.pop(0)
        ms = {form: 1.0 if form == name else 9.0 for form in calls}
        return {form: Latency(median_ms=ms[form], p95_ms=ms[form], runs=3) for form in calls}

    monkeypatch.setattr(optimize, "latencies", latencies)
    monkeypatch.setattr(optimize, "linear_kinds", lambda model, dtype, device: ["int8_weights"])
    return names


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))


def run(model, inputs, **options):
    return optimize_for_shapes(model, inputs, compile=False, budget=1e-2, **options)


def test_each_size_has_the_form_that_is_fastest_for_it(fastest, model):
    fastest += ["bf16+int8_weights", "bf16"]
    before = copy.deepcopy(model.state_dict())
    few, many = torch.randn(1, 256), torch.randn(64, 256)
    served, plans, cards = run(model, [few, many])
    assert {name: plan.form.name for name, plan in plans.items()} == {"1x256": "bf16+int8_weights", "64x256": "bf16"}
    assert [card.batch_size for card in cards.values()] == [1, 64]
    assert served.name_for(torch.randn(6, 256)) == "1x256"
    assert served.name_for(torch.randn(32, 256)) == "64x256"
    for x in (few, many, torch.randn(32, 256)):
        torch.testing.assert_close(served(x), model(x), rtol=5e-2, atol=5e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_alike_are_there_once(fastest, model):
    fastest += ["bf16", "bf16+int8_weights", "bf16"]
    served = run(model, [torch.randn(size, 256) for size in (1, 8, 64)]).model
    tensors = [*served.parameters(), *served.buffers()]
    assert distinct_bytes(tensors) == 2 * sum(weight.numel() for weight in model.parameters()) + 256 * 256 + 4 * 256
    assert served.forms[0].model[2].weight.data_ptr() == served.forms[1].model[2].weight.data_ptr()


def test_forms_with_other_weights_memory_are_called_once(fastest, model, monkeypatch):
    """What is compiled or recorded is so before a user calls it."""
    warmed = []
    monkeypatch.setattr(optimize_shapes, "_warmed", lambda served, inputs: warmed.append((served.form, len(inputs))))
    fastest += ["bf16", "fp32", "bf16"]
    run(model, [torch.randn(size, 256) for size in (1, 8, 64)])
    assert warmed == [(Form(format="bf16"), 64)]


def test_names_of_ones_own_and_arguments_by_name(fastest, model):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, scale=None):
            return self.inner(x) * (1 if scale is None else scale)

    fastest += ["bf16", "fp32"]
    given = {"prefill": {"x": torch.randn(64, 256), "scale": torch.ones(8)}, "decode": (torch.randn(1, 256),)}
    served, plans, _ = run(Named(), given)
    assert list(plans) == ["prefill", "decode"]
    assert served.name_for(scale=torch.ones(8), x=torch.randn(8, 256)) == "prefill"
    assert served.name_for(torch.randn(8, 256)) == "decode"


def test_names_are_of_all_shapes_where_the_first_does_not_tell(fastest):
    fastest += ["fp32", "fp32"]
    x = torch.randn(3, 4)
    plans = run(Sum(), [(x, torch.randn(3, 4)), (x, torch.randn(4))]).plans
    assert list(plans) == ["3x4, 3x4", "3x4, 4"]


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, y):
        return self.layer(x + y)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(1, 256), torch.randn(8, 256)), "a tuple as example inputs"),
        (torch.randn(1, 256), "a Tensor as example inputs"),
        ([], "an empty list as example inputs"),
        ({}, "an empty dict as example inputs"),
        ([endless := {}, endless.setdefault("x", [endless])], "example inputs with a dict that holds itself"),
        ([torch.randn(1, 256), torch.randn(1, 256)], r"two example inputs of the shapes \(\(1, 256\),\)"),
    ],
)
def test_what_is_refused(fastest, model, inputs, message):
    with pytest.raises(ConfigError, match=message):
        run(model, inputs)
    with pytest.raises(ConfigError, match="budget=-1"):
        optimize_for_shapes(model, [torch.randn(1, 256)], budget=-1)


def test_names_that_are_the_same_text_are_refused():
    with pytest.raises(ConfigError, match=r"example inputs named 1, 1\. Allowed: a name once"):
        optimize_for_shapes(nn.Linear(4, 2), {1: torch.randn(2, 4), "1": torch.randn(3, 4)})
