"""Preparation leaves the model alone and refuses, with a reason, what it cannot do."""

from __future__ import annotations

import importlib.util
import logging
import math
import threading

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.qat import convert, preparation, prepare

X = torch.randn(4, 8)


def linear():
    return nn.Sequential(nn.Linear(8, 4))


def test_the_model_is_as_it_was_and_shares_nothing():
    model = linear()
    before = model[0].weight.detach().clone()
    simulated = prepare(model.eval(), X)
    assert not model.training
    assert not simulated.training
    with torch.no_grad():
        for param in simulated.parameters():
            param.add_(1)
    assert torch.equal(model[0].weight, before)
    assert type(model[0]) is nn.Linear


def test_random_numbers_go_on_as_if_nothing_had_been_made():
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)), torch.randn(4, 1, 6, 6)
    before = torch.get_rng_state()
    convert(prepare(model, x))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_was_trained_here_is_quantised_and_stays_converted():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(32, 32)
    MixedPrecisionTrainer(model, "tensor", device="cpu", emulate=True)
    converted = type(model[0])
    simulated = prepare(model, x)
    assert simulated.decisions[0].new == "int8"
    with simulated.observing():  # nothing of the other format is left in the copy
        hidden = torch.relu(x @ model[0].weight.T + model[0].bias)
        torch.testing.assert_close(simulated(x), hidden @ model[2].weight.T + model[2].bias)
    assert type(model[0]) is converted


def test_keyword_arguments_and_other_batch_sizes():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 2)

        def forward(self, a, b):
            return self.one(a) + self.one(b)

    simulated = prepare(Named(), {"a": X, "b": X})
    assert simulated(a=X[:3], b=X[:3]).shape == (3, 2)


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("deepseek_mp.qat.preparation.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'deepseek-mp\[quant\]'"):
        prepare(linear(), X)
    assert importlib.util.find_spec("torchao")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_example_inputs_that_are_not_finite_are_refused(bad):
    with pytest.raises(ConfigError, match="example_inputs with NaN or infinite values"):
        prepare(linear(), torch.where(X[0, 0] == X, bad, X))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    model = linear()
    model[0].weight.data[0] = bad
    with pytest.raises(ConfigError, match="a model whose layer '0' has weights that are not finite"):
        prepare(model, X)


def test_a_mask_may_be_infinite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.mask = nn.Parameter(torch.full((8, 8), -math.inf).triu(1), requires_grad=False)

        def forward(self, x):
            return torch.softmax(self.layer(x).unsqueeze(1) + self.mask, -1)

    model = Masked()
    torch.testing.assert_close(prepare(model, X).eval()(X), model(X), atol=0.02, rtol=0)


@pytest.mark.parametrize("inputs", [X[:1], X[:0], torch.tensor(1.0), (), {"a": 1}])
def test_fewer_than_two_samples_are_refused(inputs):
    with pytest.raises(ConfigError, match="two samples or more"):
        prepare(linear(), inputs)


def test_nothing_to_quantise_is_refused_with_the_reasons():
    with pytest.raises(ConfigError, match=r"nothing to quantise \(it has no such layer\)"):
        prepare(nn.Sequential(nn.LayerNorm(8)), X)
    with pytest.raises(ConfigError, match=r"nothing to quantise \(0: named in keep\)"):
        prepare(linear(), X, keep=["0"])


@pytest.mark.parametrize("keep", [["last"], "0", [None]])
def test_names_that_the_model_does_not_have_are_refused(keep):
    with pytest.raises(ConfigError, match="a list of names of the model's modules"):
        prepare(linear(), X, keep=keep)


def test_a_model_that_cannot_be_exported_is_refused():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    model = Branching(8, 8).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"a Branching that torch.export cannot export \(\w+: .+\)"):
        prepare(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert type(model) is Branching


def test_a_model_that_cannot_be_copied_is_refused():
    model = linear()
    model.lock = threading.Lock()
    with pytest.raises(ConfigError, match="that cannot be copied"):
        prepare(model, X)


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyBatchNorm1d()])
def test_a_model_that_waits_for_its_first_batch_is_refused(layer):
    with pytest.raises(ConfigError, match="'0' has parameters without a shape yet"):
        prepare(nn.Sequential(layer), X)


def test_a_model_elsewhere_is_refused():
    with pytest.raises(ConfigError, match="a model or example_inputs on meta"):
        prepare(linear().to("meta"), X)
    with pytest.raises(ConfigError, match="a model or example_inputs on meta"):
        prepare(linear().to("meta"), X.to("meta"))


def test_the_old_flags_of_fp32_products_are_not_read(monkeypatch):
    monkeypatch.delattr(torch._C, "_get_cudnn_allow_tf32")  # it raises where users write the new ones
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))  # which torchao finds by exported patterns
    assert prepare(model, torch.randn(4, 3, 8, 8)).decisions


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_in_another_format_are_refused(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=dtype))
    with pytest.raises(ConfigError, match=rf"'1.weight' in {dtype}.*weights in FP32"):
        prepare(model, torch.randn(4, 4))


def test_a_model_that_writes_to_its_input_does_not_write_to_the_examples():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x.mul_(2))

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    before = x.clone()
    simulated = prepare(Writes(), x)
    convert(simulated)
    assert torch.equal(x, before)
    assert torch.equal(simulated.example[0][0], before)  # a second conversion finds them so, too


class Several(nn.Module):
    """Takes as many inputs as it is given, and by name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, first, flag=None, *others, last=None):
        assert flag is None
        return self.linear(sum(others, first)) if last is None else self.linear(first) + last


def test_inputs_of_a_forward_with_any_number_of_them_are_taken_in_other_sizes():
    model = Several().eval()
    simulated = prepare(model, (X, None, X, X))
    other = torch.cat([X, X])
    torch.testing.assert_close(
        simulated(other, None, other, other), model(other, None, other, other), atol=0.1, rtol=0.1
    )


def test_named_inputs_may_be_in_any_order_with_others_than_tensors_between():
    model, last = Several().eval(), torch.randn(8, 4)
    simulated = prepare(model, {"last": last[:4], "flag": None, "first": X})
    named = {"last": last, "flag": None, "first": torch.cat([X, X])}
    torch.testing.assert_close(simulated(**named), model(**named), atol=0.1, rtol=0.1)


def test_inputs_that_the_model_itself_does_not_take_are_named_as_the_reason():
    for inputs in ((X, torch.zeros(4)), [X], torch.randn(4, 9), X.double()):
        with pytest.raises(
            ConfigError, match=r"example_inputs with which the Sequential itself fails \(\w+: .* without targets"
        ):
            prepare(linear(), inputs)


def test_a_forward_with_any_names_is_refused():
    class Named(nn.Sequential):
        def forward(self, **inputs):
            return super().forward(inputs["x"])

    with pytest.raises(ConfigError, match=r"a Named whose forward takes 'x' by \*\*inputs"):
        prepare(Named(nn.Linear(8, 4)), {"x": X})


def test_torchao_does_not_speak_about_itself(monkeypatch, caplog):
    def speaks(name):
        logging.getLogger(name.partition(".")[0]).warning("Failed to load a kernel")

    monkeypatch.setattr(preparation, "import_module", speaks)
    preparation.require_torchao()
    assert not caplog.records


def test_the_exporter_does_not_warn_of_recurrent_layers(recwarn):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.last = nn.GRU(8, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.recurrent(x)[0])

    prepare(Recurrent(), torch.randn(4, 3, 8))
    assert not [one for one in recwarn if "_flat_weights" in str(one.message)]
