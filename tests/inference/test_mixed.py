"""The forms with kinds by layer: what they are chosen on, and when there are none."""

import copy

import pytest
import torch
from torch import nn

from deepseek_mp.inference import Form, LayerChoice, LayerPlan, Served, kl, mixed
from deepseek_mp.inference.mixed import MixedForms

CPU, INT8 = torch.device("cpu"), "int8_weights"
KINDS = [Form(format="bf16", linear=INT8, folded=True), Form(format="bf16", linear=INT8, folded=True, compiled=True)]
KINDS += [Form(format="bf16", linear="int4_weights", folded=True)]
OTHERS = [Form(), Form(format="bf16"), *KINDS]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 300))


@pytest.fixture
def plan(monkeypatch):
    """What is chosen, by layer, and on which benches."""
    given = {"kinds": {}, "benches": []}

    def by_layer(bench, kinds, *, budget, seconds):
        given["benches"].append((bench, kinds, budget, seconds))
        choices = tuple(LayerChoice(layer=name, kind=kind, why="so") for name, kind in given["kinds"].items())
        return LayerPlan(why="as the test says", choices=choices)

    monkeypatch.setattr(mixed, "by_layer", by_layer)
    return given


def made(model, others=OTHERS, seconds=5.0):
    x = torch.randn(2, 256)
    found = MixedForms(model, list(others), lambda served: served(x), kl, 0.5, seconds)
    plain = [form for form in others if form.linear is None]
    return found, found.forms({form: Served(model, form, CPU) for form in plain})


def test_one_form_for_each_way_in_which_the_code_runs(model, plan):
    plan["kinds"] = {"0": INT8, "2": None, "3": "int4_weights"}
    found, forms = made(model)
    layers = (("0", INT8), ("3", "int4_weights"))
    assert forms == [
        Form(format="bf16", layers=layers, folded=True),
        Form(format="bf16", layers=layers, folded=True, compiled=True),
    ]
    assert found.plan.kinds == layers
    ((bench, kinds, budget, seconds),) = plan["benches"]
    assert (kinds, budget, seconds) == ([INT8, "int4_weights"], 0.5, 5.0)
    assert bench.model is model
    assert bench.dtype is torch.bfloat16
    assert bench.base[0].weight.dtype is torch.bfloat16
    torch.testing.assert_close(bench.call(), bench.reference, rtol=5e-2, atol=5e-2)
    assert bench.reference.dtype is torch.float32


def test_a_base_that_was_not_built_is_built(model, plan):
    plan["kinds"] = {"0": INT8}
    assert made(model, [Form(), *KINDS])[1]


def test_one_kind_for_all_is_a_form_already(model, plan):
    plan["kinds"] = {"0": INT8, "2": INT8, "3": INT8}
    found, forms = made(model)
    assert forms == []
    assert found.plan.why == "int8_weights for all, a form of its own; as the test says"


def test_why_there_are_none(model, plan, monkeypatch):
    found, forms = made(model)
    assert (forms, found.plan.why) == ([], "as the test says")
    found, forms = made(model, OTHERS[:2])
    assert (forms, found.plan.why) == ([], "not tried: the model and the device have no kinds of linear layers")
    found, forms = made(model, seconds=0.0)
    assert (forms, found.plan.why) == ([], "not tried: no time was given to it")
    monkeypatch.setattr(mixed, "by_layer", lambda *about, **others: 1 / 0)
    found, forms = made(model)
    assert (forms, found.plan.why) == ([], "not tried: ZeroDivisionError: division by zero")


def test_the_state_of_forms_is_as_before(plan):
    class Counts(nn.Linear):
        times = 0

        def forward(self, x):
            self.times += 1
            return super().forward(x) * self.times

    x, served = torch.randn(2, 4), Served(Counts(4, 4), Form(), CPU)
    served.model.times = 6
    plain = Served(nn.Linear(4, 4), Form(format="bf16"), CPU)
    MixedForms(nn.Linear(4, 4), OTHERS, lambda one: one(x), kl, 0.5, 5.0).forms({Form(): served, OTHERS[1]: plain})
    assert served.model.times == 6
    ((bench, *_),) = plan["benches"]
    torch.testing.assert_close(bench.reference, 7 * nn.functional.linear(x, served.model.weight, served.model.bias))


def test_nothing_of_the_model_is_changed(model):
    before = copy.deepcopy(model.state_dict())
    made(model, seconds=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
