"""A linear layer with weights in 8 bits: what it computes and keeps, and which layers of a model become one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import QuantisedLinear
from deepseek_mp.inference import quantised_linear as module
from deepseek_mp.inference.quantised_linear import linear_kinds, linear_layers, quantised
from deepseek_mp.ops.weight_only import quantised_weight

BF16 = torch.bfloat16


def made(layer, kind="int8_weights", dtype=BF16):
    return quantised(copy.deepcopy(layer), kind, dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_layer_with_rounded_weights(bias, format, dtype):
    layer = nn.Linear(256, 257, bias=bias)
    found = made(layer, f"{format}_weights", dtype)
    q, scale = quantised_weight(layer.weight, format)
    x = torch.randn(2, 3, 256).to(dtype)
    with torch.no_grad():
        expected = nn.functional.linear(x.float(), q.float() * scale[:, None], layer.bias)
        out = found(x)
        assert out.dtype is dtype
        torch.testing.assert_close(out.float(), expected, rtol=2**-6, atol=2**-6)
        assert found(x[0, 0]).shape == (257,)
    torch.testing.assert_close(found.weight, (q.float() * scale[:, None]).to(dtype))


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
    layers, left = linear_layers(model)
    assert list(layers) == ["blocks.0", "blocks.1"]
    assert left == {
        "small": "it has 65280 weights, fewer than 65536",
        "hooked": "it has hooks, which would be lost",
        "own": "a NonDynamicallyQuantizableLinear may use its weight in a way of its own",
        "again": "its weight is shared",
        "head": "its weight is shared",
    }
    found = quantised(model, "int8_weights", BF16)
    assert found is model
    assert [type(layer) for layer in found.blocks] == [QuantisedLinear] * 2
    assert found.blocks[0].q.dtype is torch.int8
    assert found.head.weight is found.words.weight
    assert found.head.weight.dtype is BF16
    assert linear_layers(found)[1] == left


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
    monkeypatch.setattr(module, "fastest", lambda device, dtype, format, width: "native")
    assert linear_kinds(model, BF16, cpu) == ["int8_weights"]  # no CPU multiplies FP8
    assert linear_kinds(nn.Linear(8, 8), BF16, cpu) == []
    monkeypatch.setattr(module, "fastest", lambda device, dtype, format, width: None)
    assert linear_kinds(model, BF16, cpu) == []


@pytest.mark.stress
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_compiled_code_has_it_as_one_op(format):
    layer = made(nn.Linear(256, 256), f"{format}_weights")
    x = torch.randn(4, 256).to(BF16)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
