"""A served copy computes what the model computes in evaluation, and the model stays as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, Served
from deepseek_mp.inference.serve import has_images, has_norms

CPU = torch.device("cpu")
CLOSE = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.mark.parametrize("format", CLOSE)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_are_those_of_the_model_in_evaluation(classifier, format, folded, channels_last):
    before = copy.deepcopy(classifier.state_dict())
    x = torch.randn(4, 3, 8, 8)
    served = Served(classifier, Form(format=format, folded=folded, channels_last=channels_last), CPU)
    found = served(x)
    assert classifier.training
    for key, value in classifier.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert found.dtype is torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, classifier.eval()(x), rtol=CLOSE[format], atol=CLOSE[format])


def test_folded_norms_are_gone(classifier):
    served = Served(classifier, Form(folded=True), CPU)
    assert not has_norms(served.model)
    assert has_norms(classifier)


def test_weights_are_kept_in_the_format_and_layout(classifier):
    served = Served(classifier, Form(format="bf16", channels_last=True), CPU)
    weight = served.model[0].weight
    assert weight.dtype is torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)


class Pair(nn.Module):
    """A mapping in, a mapping and whole numbers out."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, *, tokens, scale):
        scores = self.head(self.words(tokens)) * scale
        return {"logits": scores, "best": scores.argmax(-1)}


def test_structures_and_whole_numbers_pass_through():
    model = Pair()
    given = {"tokens": torch.tensor([[1, 2]]), "scale": torch.tensor(2.0)}
    found, expected = Served(model, Form(format="bf16"), CPU)(**given), model(**given)
    assert found["best"].dtype is torch.int64
    assert found["logits"].dtype is torch.float32
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=3e-2, atol=3e-2)


def test_fp64_stays_fp64_in_fp32_form():
    model = nn.Linear(4, 2).double()
    assert Served(model, Form(), CPU)(torch.ones(1, 4, dtype=torch.float64)).dtype is torch.float64


def test_a_model_in_16_bits_is_served_in_fp32_as_fp32():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).bfloat16().eval()
    served, x = Served(model, Form(), CPU), torch.randn(3, 4)
    assert {tensor.dtype for tensor in served.parameters()} == {torch.float32}
    assert model[0].weight.dtype is torch.bfloat16
    assert torch.equal(served(x.bfloat16()), copy.deepcopy(model).float()(x.bfloat16().float()))


def test_each_compiled_copy_has_the_compilers_whole_patience(classifier, monkeypatch):
    """More forms than the compiler keeps of one code: none of them falls back to eager code without a word."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            Served(classifier, Form(compiled=True), CPU)(torch.randn(2, 3, 8, 8))
    assert counters["stats"]["unique_graphs"] == 4
    torch._dynamo.reset()


def test_what_cannot_be_traced_is_not_folded():
    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    with pytest.raises(ConfigError, match="cannot be traced to fold its BatchNorms"):
        Served(Decides(), Form(folded=True), CPU)


def test_a_forward_that_may_ask_whether_an_argument_is_given_is_not_folded():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x, double=None):
            x = self.norm(self.conv(x))
            return x if double is None else 2 * x

    with pytest.raises(ConfigError, match="double=None"):
        Served(Skips(), Form(folded=True), CPU)


@pytest.mark.parametrize("at", ["", "0", "1"])
def test_hooks_are_not_lost_by_folding(at):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    model.get_submodule(at).register_forward_hook(lambda _module, _inputs, output: output * 2)
    with pytest.raises(ConfigError, match="hooks, which would be lost"):
        Served(model, Form(folded=True), CPU)


def test_what_cannot_be_copied_is_refused():
    model = nn.Linear(2, 2)
    model.extra = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(ConfigError, match="a Linear that cannot be copied"):
        Served(model, Form(), CPU)


def test_training_a_served_model_is_refused():
    served = Served(nn.Linear(2, 2), Form(), CPU)
    assert served.eval() is served
    with pytest.raises(ConfigError, match=r"train\(\) of a model served in fp32"):
        served.train()


def test_images_and_norms_are_seen(classifier):
    assert has_images(classifier)
    assert has_norms(classifier)
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert not has_images(plain)
    assert not has_norms(plain)


@pytest.mark.parametrize("kind", ["int8_weights", "fp8_weights"])
@pytest.mark.parametrize("folded", [False, True])
def test_weights_of_large_linear_layers_are_in_8_bits(kind, folded):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 256), nn.Linear(256, 5)
    ).eval()
    served = Served(model, Form(format="bf16", linear=kind, folded=folded), CPU)
    kinds = [type(module).__name__ for module in served.modules() if "Linear" in type(module).__name__]
    assert kinds == ["QuantisedLinear", "Linear"]
    assert list(served.left_alone.values()) == ["it has 1280 weights, fewer than 65536"]
    assert [type(module) for module in model if isinstance(module, nn.Linear)] == [nn.Linear] * 2
    x = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(served(x), model(x), rtol=5e-2, atol=5e-2)


def test_a_model_without_large_linear_layers_has_no_such_form(classifier):
    with pytest.raises(ConfigError, match=r"without a linear layer for int8_weights \(8: it has 40 weights"):
        Served(classifier, Form(format="bf16", linear="int8_weights"), CPU)
    assert Served(classifier, Form(format="bf16"), CPU).left_alone == {}


def test_layers_by_name_are_of_their_kinds():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3))).eval()
    layers = (("0", "int8_weights"), ("2", "fp8_weights"))
    served = Served(model, Form(format="bf16", layers=layers), CPU)
    found = {name: getattr(module, "kind", None) for name, module in served.model.named_children()}
    assert found == {"0": "int8_weights", "1": None, "2": "fp8_weights"}
    assert served.model[1].weight.dtype is torch.bfloat16
    assert served.left_alone == {}


def test_int8_is_not_served_here():
    with pytest.raises(ConfigError, match=r"served in 'int8'.*QuantizationAwareTrainer"):
        Served(nn.Linear(4, 2), Form(format="int8"), torch.device("cpu"))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own_weights(monkeypatch, again):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend="eager"))
    served, x = Served(nn.Linear(4, 2), Form(compiled=True), torch.device("cpu")), torch.randn(3, 4)
    expected = served(x)
    made = again(served)
    assert torch.equal(made(x), expected)
    with torch.no_grad():
        made.model.weight.zero_()
        made.model.bias.zero_()
    assert not made(x).any()
    assert torch.equal(served(x), expected)


@pytest.mark.parametrize("kind", [None, "int8_weights"])
def test_complex_buffers_stay_complex(kind):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(256, 256)
            self.register_buffer("turns", torch.polar(torch.ones(128), torch.arange(128.0)))

        def forward(self, x):
            pairs = self.layer(x).float().unflatten(-1, (128, 2))
            return torch.view_as_real(torch.view_as_complex(pairs) * self.turns).flatten(-2)

    model, x = Turned(), torch.randn(3, 256)
    served = Served(model, Form(format="bf16", linear=kind), torch.device("cpu"))
    assert torch.equal(served.model.turns, model.turns)
    torch.testing.assert_close(served(x), model(x), rtol=5e-2, atol=5e-2)


def test_a_norm_is_not_folded_into_a_convolution_that_is_called_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) + self.conv(x)

    with pytest.raises(ConfigError, match="conv is called more than once"):
        Served(Twice(), Form(folded=True), torch.device("cpu"))


class Looked(nn.Module):
    """Reads the weight of a convolution, and counts its calls."""

    def __init__(self, *, at_weight, counts):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.at_weight, self.counts, self.calls = at_weight, counts, 0

    def forward(self, x):
        if self.counts:
            self.calls += 1
        y = self.norm(self.conv(x)) + self.calls
        return y + self.conv.weight.sum() if self.at_weight else y


def test_a_norm_is_not_folded_into_a_convolution_whose_weight_is_read_elsewhere():
    with pytest.raises(ConfigError, match=r"conv\.weight is read by itself"):
        Served(Looked(at_weight=True, counts=False), Form(folded=True), torch.device("cpu"))


def test_norms_are_not_folded_in_a_forward_that_changes_attributes():
    model = Looked(at_weight=False, counts=True)
    with pytest.raises(ConfigError, match=r"its forward changes calls, which a trace would keep"):
        Served(model, Form(folded=True), torch.device("cpu"))
    assert model.calls == 0
    Served(Looked(at_weight=False, counts=False), Form(folded=True), torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "add"),
    [
        (list, lambda kept: kept.append(1)),
        (dict, lambda kept: kept.update({len(kept): 1})),
        (set, lambda kept: kept.add(len(kept))),
    ],
    ids=["list", "dict", "set"],
)
def test_norms_are_not_folded_in_a_forward_that_adds_to_what_it_keeps(kind, add):
    class Remembers(nn.Sequential):
        def forward(self, x):
            add(self.kept)
            return super().forward(x) * len(self.kept)

    torch.manual_seed(0)
    model = Remembers(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.kept = kind()
    with pytest.raises(ConfigError, match=r"its forward changes kept, which a trace would keep"):
        Served(model, Form(folded=True), CPU)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((None, Form(), CPU), "model of type NoneType. Allowed: a model, a Form and a torch.device"),
        ((nn.Linear(4, 2), "bf16", "cpu"), "form of type str, device of type str"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments, match):
    with pytest.raises(ConfigError, match=match):
        Served(*arguments)
