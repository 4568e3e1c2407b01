"""The forms with kinds by layer: what they are chosen on, and when there are none."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from deepseek_mp.inference import Form, LayerChoice, LayerPlan, Served, kl, mixed
from deepseek_mp.inference.layer_savings import LayerSavings
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
    """What is chosen, by layer, on which benches, and of which times."""
    given = {"kinds": {}, "benches": [], "share": {}, "timed": []}

    def layer_savings(base, call, kinds, *, dtype, device, seconds):
        given["timed"].append((kinds, seconds))
        return LayerSavings(layers=(), saved={}, left={}, share=given["share"], seconds=1.0)

    def by_layer(bench, savings, *, budget, seconds):
        given["benches"].append((bench, budget, seconds))
        choices = tuple(LayerChoice(layer=name, kind=kind, why="so") for name, kind in given["kinds"].items())
        return LayerPlan(why="as the test says", choices=choices)

    monkeypatch.setattr(mixed, "by_layer", by_layer)
    monkeypatch.setattr(mixed, "layer_savings", layer_savings)
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
    ((bench, budget, seconds),) = plan["benches"]
    assert (budget, seconds) == (0.5, 4.0)
    assert plan["timed"] == [([INT8, "int4_weights"], 2.5)]
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
    for step in ("by_layer", "layer_savings"):
        monkeypatch.setattr(mixed, step, lambda *about, **others: 1 / 0)
        found, forms = made(model)
        assert (forms, found.plan.why) == ([], "not tried: ZeroDivisionError: division by zero")


def needless(model, errors, forms, seconds=5.0):
    """Of forms with kinds, why they need not be built."""
    x = torch.randn(2, 256)
    found = MixedForms(model, OTHERS, lambda served: served(x), kl, 0.5, seconds)
    served = {form: Served(model, form, CPU) for form in OTHERS[:2]}
    return [found.needless(form, served, errors) for form in forms], found, served


def test_kinds_whose_layers_are_much_slower_are_left_to_plain_code(model, plan):
    plan["share"] = {INT8: 1.6, "fp8": 1.6, "int4_weights": 1.4}
    forms = [Form(format="bf16", linear=kind, compiled=True) for kind in plan["share"]]
    said, found, served = needless(model, {}, [*forms, replace(forms[0], graphed=True)])
    slow = "not built: its layers take 1.6 times as long as in 16 bits"
    assert said == [slow, "", "", slow], "the rounding of inputs may be joined to what is before"
    found.forms(served)
    assert len(plan["timed"]) == 1, "layers are timed once"
    assert needless(model, {}, [replace(forms[0], compiled=False), Form(format="bf16", compiled=True)])[0] == ["", ""]
    assert needless(model, {}, forms, seconds=0.0)[0] == ["", "", ""]


def test_no_outputs_and_no_copy_are_kept_while_other_forms_are_built(model, plan):
    x, outputs = torch.randn(2, 256), []

    def call(served):
        made = served(x)
        outputs.append(weakref.ref(made))
        return made

    found = MixedForms(model, [Form(), *KINDS], call, kl, 0.5, 5.0)
    found.needless(KINDS[1], {Form(): Served(model, Form(), CPU)}, {})
    gc.collect()
    assert len(plan["timed"]) == 1
    assert [made() for made in outputs] == [None] * len(outputs)
    assert not [one for one in gc.get_objects() if isinstance(one, Served) and one.form == Form(format="bf16")]


def test_kinds_far_beyond_the_budget_are_left_to_plain_code(model, plan):
    way = Form(format="bf16", linear=INT8, folded=True)
    forms = [replace(way, compiled=True), replace(way, graphed=True), replace(way, compiled=True, folded=False)]
    said, *_ = needless(model, {way: 2.1}, forms)
    assert said == ["not built: as plain code its error of 2.1 is far beyond the budget of 0.5"] * 2 + [""]
    assert needless(model, {way: 1.9}, forms)[0] == ["", "", ""]
    assert needless(model, {way: 2.1}, [way])[0] == [""]


def test_without_times_all_forms_are_built(model, monkeypatch):
    monkeypatch.setattr(mixed, "layer_savings", lambda *about, **others: 1 / 0)
    assert needless(model, {}, KINDS)[0] == ["", "", ""]


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
