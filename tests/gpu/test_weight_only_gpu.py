"""Kinds of linear layers on a GPU: a decoder's layers against the reference, and served models in all their forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.backends import capabilities
from deepseek_mp.inference import Form, QuantisedLinear, Served
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.quantised_linear import linear_kinds
from deepseek_mp.ops import int4_linear

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)]
"""Channels and widths of the layers of a decoder of 7B weights."""
ROWS = [1, 2, 3, 8, 16, 17, 64, 512]
IMPLEMENTATIONS = [
    ("int8_weights", "triton"), ("fp8_weights", "triton"), ("fp8", "native"), ("int4_weights", "triton"),
    ("int4_weights", "native"),
]  # fmt: skip
ROUNDING = 4e-3
"""Norm of what rounding to BF16 does to a result, twice, relative to it."""
OFF = {"int8_weights": 0.03, "fp8_weights": 0.06, "fp8": 0.09, "int4_weights": 0.2}
"""How far outputs of two layers may be from those of the model, relative to them."""


def needs(kind):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    needed = KINDS[kind].needs
    if needed is not None and needed not in capabilities(DEVICE).matmul_formats:
        pytest.skip(f"the device has no {needed}")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 256)).to(DEVICE).eval()


@pytest.fixture(params=KINDS)
def kind(request, model):
    needs(request.param)
    if request.param not in linear_kinds(model, BF16, DEVICE):
        pytest.skip(f"no product of {request.param} here")
    return request.param


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "implementation"), IMPLEMENTATIONS)
def test_a_decoder_s_layers_are_those_of_the_reference(kind, implementation, shape):
    needs(kind)
    of, (channels, width) = KINDS[kind], shape
    if implementation == "native" and kind == "int4_weights":
        if not int4_linear.has_native(DEVICE, channels, int4_linear.group_of(width)):
            pytest.skip("PyTorch has no product with 4 bits here")
    elif of.fastest(DEVICE, BF16, channels, width) != implementation:
        pytest.skip(f"no {implementation} product of {kind} here")
    kept = of.keep(torch.randn(shape, device=DEVICE) * width**-0.5, "a weight")
    prepared = of.prepared(kept, implementation)
    for name, part in of.unprepared(prepared, implementation).items():
        assert torch.equal(part.view(torch.uint8), kept[name].view(torch.uint8))
    bias = torch.randn(channels, device=DEVICE, dtype=BF16)
    for rows in ROWS:
        x = torch.randn(rows, width, device=DEVICE).to(BF16)
        expected = of.linear(x.float(), kept, bias, "reference")
        found = of.linear(x, prepared, bias, implementation)
        assert found.dtype is BF16
        assert distance(found, expected) < ROUNDING, rows
        torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_fp8_of_what_is_not_finite_is_not_finite(dtype):
    needs("fp8")
    of = KINDS["fp8"]
    if of.fastest(DEVICE, dtype, 512, 512) is None:
        pytest.skip(f"no product of FP8 with results in {dtype} here")
    kept = of.keep(torch.randn(512, 512, device=DEVICE), "a weight")
    x = torch.randn(5, 512, device=DEVICE).to(dtype)
    x[1, 100], x[3, 511] = torch.nan, torch.inf
    layer = torch.compile(lambda x: of.linear(x, kept, None, "native"), fullgraph=True)
    for found in (of.linear(x, kept, None, "native"), layer(x)):
        assert found.isfinite().all(1).tolist() == [True, False, True, False, True]
        assert not found[1].isfinite().any()
        assert not found[3].isfinite().any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 200])
def test_outputs_are_those_of_the_model(model, kind, rows, compiled):
    served = Served(model, Form(format="bf16", linear=kind, compiled=compiled), DEVICE)
    kept = [module for module in served.modules() if isinstance(module, QuantisedLinear)]
    assert [layer.implementation for layer in kept] == [{"fp8": "native"}.get(kind, "triton")] * 2
    x = torch.randn(rows, 512, device=DEVICE)
    with torch.no_grad():
        assert distance(served(x), model(x)) < OFF[kind]


def test_layers_of_several_kinds(model):
    kinds = linear_kinds(model, BF16, DEVICE) if torch.cuda.is_available() else []
    if len(kinds) < 2:
        pytest.skip("no two kinds of linear layers here")
    served = Served(model, Form(format="bf16", layers=(("0", kinds[0]), ("2", kinds[-1]))), DEVICE)
    assert [served.model[place].kind for place in (0, 2)] == [kinds[0], kinds[-1]]
    x = torch.randn(8, 512, device=DEVICE)
    with torch.no_grad():
        assert distance(served(x), model(x)) < OFF[kinds[0]] + OFF[kinds[-1]]


@pytest.mark.parametrize("rows", [1, 8, 17])
def test_a_graph_replays_it_with_new_inputs(model, kind, rows):
    served = Served(model, Form(format="bf16", linear=kind), DEVICE)
    x = torch.randn(rows, 512, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        served(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = served(x)
    x.copy_(torch.randn(rows, 512, device=DEVICE))
    graph.replay()
    assert torch.equal(out, served(x))
