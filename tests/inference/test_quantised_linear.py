"""A linear layer with weights in 8 bits: what it computes and keeps, and which layers of a model become one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.inference import QuantisedLinear
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.quantised_linear import linear_kinds, linear_layers, quantised
from deepseek_mp.ops.weight_only import quantised_weight

BF16 = torch.bfloat16


def made(layer, kind="int8_weights", dtype=BF16):
    return quantised(copy.deepcopy(layer), kind, dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kind", ["int8_weights", "fp8_weights", "int4_weights"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [257, 272])
def test_it_is_the_layer_with_rounded_weights(channels, bias, kind, dtype):
    layer = nn.Linear(256, channels, bias=bias)
    found = made(layer, kind, dtype)
    weight = KINDS[kind].widened(KINDS[kind].keep(layer.weight, "a weight"))
    x = torch.randn(2, 3, 256).to(dtype)
    with torch.no_grad():
        expected = nn.functional.linear(x.float(), weight, layer.bias)
        out = found(x)
        assert out.dtype is dtype
        torch.testing.assert_close(out.float(), expected, rtol=2**-6, atol=2**-6)
        assert found(x[0, 0]).shape == (channels,)
    assert torch.equal(found.weight, weight.to(dtype))
    error = float(((weight - layer.weight).norm() / layer.weight.norm()).detach())
    assert 0 < error < (0.15 if kind == "int4_weights" else 0.04)


def test_fp8_rounds_the_activations_too():
    layer = nn.Linear(256, 272)
    x = torch.randn(5, 256).to(BF16)
    with torch.no_grad():
        expected, found = layer(x.float()), made(layer, "fp8")(x)
        error = (found.float() - expected).norm() / expected.norm()
        alone = (made(layer, "fp8_weights")(x).float() - expected).norm() / expected.norm()
        x[1, 3] = torch.inf
        assert made(layer, "fp8")(x).isfinite().all(1).tolist() == [True, False, True, True, True]
    assert alone * 1.2 < error < 0.06


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_the_same_in_every_implementation(kind, native, monkeypatch):
    layers = [nn.Linear(256, 272) for _ in range(2)]
    plain = [KINDS[kind].keep(layer.weight, "a weight") for layer in layers]
    if native and kind != "fp8" and not KINDS[kind].fastest(torch.device("cpu"), BF16, 272, 256):
        pytest.skip(f"this PyTorch has no product of {kind} for this CPU")
    if not native:
        monkeypatch.setattr(type(KINDS[kind]), "fastest", lambda *_: None)
    first, second = (made(layer, kind) for layer in layers)
    assert (first.implementation == "reference") is (not native or kind == "fp8")
    for name, tensor in plain[0].items():
        assert torch.equal(first.state_dict()[name].float(), tensor.float())
    assert set(first.state_dict()) == {*plain[0], "bias"}
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 256).to(BF16)
    with torch.no_grad():
        assert torch.equal(second(x), first(x))
    holder = nn.Sequential(nn.ReLU(), made(layers[1], kind))
    holder.load_state_dict({f"1.{name}": tensor for name, tensor in first.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(holder[1](x), first(x))
    broken = first.state_dict()
    del broken["scale"]
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict(broken)


def test_sizes_that_a_kind_does_not_take_are_left():
    model = nn.Sequential(nn.Linear(256, 264), nn.Linear(264, 256), nn.Linear(272, 256))
    assert list(linear_layers(model, "int8_weights")[0]) == ["0", "1", "2"]
    assert linear_layers(model, "fp8")[1] == {
        "0": "264 channels of 256 weights are not in whole 16s",
        "1": "256 channels of 264 weights are not in whole 16s",
    }  # fmt: skip
    assert linear_layers(model, "int4_weights")[1] == {
        "1": "its rows of 264 weights are not in whole 32s", "2": "its rows of 272 weights are not in whole 32s",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"for fp8, int4_weights \(1: its rows of 264 weights"):
        quantised(model, {"1": "int4_weights", "2": "fp8"}, BF16)


def test_what_it_keeps_is_a_byte_a_weight_and_a_scale_a_channel():
    layer = nn.Linear(256, 256)
    state = made(layer).state_dict()
    kept = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    assert kept == {"q": (torch.int8, (256, 256)), "scale": (torch.float32, (256,)), "bias": (BF16, (256,))}
    assert "kind=int8_weights" in repr(made(layer))


def test_weights_are_rounded_once_and_not_after_bf16():
    layer = nn.Linear(256, 256)
    q, scale = quantised_weight(layer.weight, "int8")
    found = made(layer)
    assert torch.equal(found.q, q)
    assert torch.equal(found.scale, scale)


class Model(nn.Module):
    """Layers of all kinds."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(300, 256)
        self.blocks = nn.ModuleList([nn.Linear(256, 256) for _ in range(2)])
        self.small = nn.Linear(255, 256)
        self.hooked = nn.Linear(256, 256)
        self.hooked.register_forward_hook(lambda *_: None)
        self.own = nn.modules.linear.NonDynamicallyQuantizableLinear(256, 256)
        self.again = self.twice = nn.Linear(256, 256)
        self.head = nn.Linear(256, 300, bias=False)
        self.head.weight = self.words.weight


def test_which_layers_become_one_and_why_others_do_not():
    model = Model()
    layers, left = linear_layers(model, "int8_weights")
    assert list(layers) == ["blocks.0", "blocks.1", "again"]
    assert left == {
        "small": "it has 65280 weights, fewer than 65536",
        "hooked": "it has hooks, which would be lost",
        "own": "a NonDynamicallyQuantizableLinear may use its weight in a way of its own",
        "head": "its weight is shared",
    }
    found = quantised(model, "int8_weights", BF16)
    assert found is model
    assert [type(layer) for layer in found.blocks] == [QuantisedLinear] * 2
    assert found.blocks[0].q.dtype is torch.int8
    assert type(found.again) is QuantisedLinear
    assert found.twice is found.again
    assert found.head.weight is found.words.weight
    assert found.head.weight.dtype is BF16
    assert linear_layers(found, "int8_weights")[1] == left


def test_a_layer_of_pytorch_s_that_reads_weights_itself_stays_right():
    model = nn.TransformerEncoderLayer(64, 4, dim_feedforward=1024, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(x)
        found = quantised(copy.deepcopy(model), "int8_weights", BF16)(x.to(BF16))
    torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=5e-2)


def test_models_that_have_none():
    with pytest.raises(ConfigError, match="it has none"):
        quantised(nn.ReLU(), "int8_weights", BF16)
    layer = nn.Linear(256, 256)
    with torch.no_grad():
        layer.weight[3, 3] = torch.nan
    with pytest.raises(ConfigError, match="weight of '1' with values that are not finite"):
        quantised(nn.Sequential(nn.ReLU(), layer), "fp8_weights", BF16)


def test_kinds_by_name():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)), nn.Linear(8, 8))
    found = quantised(copy.deepcopy(model), {"0": "int8_weights", "2": "fp8_weights"}, BF16)
    assert [getattr(layer, "kind", layer.weight.dtype) for layer in found] == [
        "int8_weights", BF16, "fp8_weights", BF16,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"for int8_weights \(3: it has 64 weights.*; 4: no linear layer"):
        quantised(model, {"0": "int8_weights", "3": "int8_weights", "4": "int8_weights"}, BF16)
    with pytest.raises(ConfigError, match="for no kind"):
        quantised(model, {}, BF16)


def test_kinds_are_those_with_more_than_the_reference(monkeypatch):
    model, cpu = nn.Linear(256, 256), torch.device("cpu")
    for kind in KINDS.values():
        monkeypatch.setattr(type(kind), "fastest", lambda *_: "native")
    assert linear_kinds(model, BF16, cpu) == ["int8_weights", "int4_weights"]  # no CPU multiplies FP8
    assert linear_kinds(nn.Linear(264, 256), BF16, cpu) == ["int8_weights"]
    assert linear_kinds(nn.Linear(8, 8), BF16, cpu) == []
    for kind in KINDS.values():
        monkeypatch.setattr(type(kind), "fastest", lambda *_: None)
    assert linear_kinds(model, BF16, cpu) == []


@pytest.mark.stress
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_has_it_as_one_op(kind):
    layer = made(nn.Linear(256, 256), kind)
    x = torch.randn(4, 256).to(BF16)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("shape", [(3, 255), (4, 128), (512,), (0, 128), ()])
def test_inputs_of_another_width_are_named(shape):
    layer, x = made(nn.Linear(256, 256)), torch.randn(shape).to(BF16)
    torch._dynamo.reset()
    for run in (layer, torch.compile(layer, backend="eager")):
        with torch.no_grad(), pytest.raises(ShapeError, match=r"an input of \[.*\] for a linear layer of width 256"):
            run(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_alone_comes_back_from_a_pickle(kind):
    torch.manual_seed(0)
    layer, x = made(nn.Linear(256, 272), kind), torch.randn(2, 256, dtype=BF16)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
