"""Weights in 8 bits on a GPU: a served model in eager and in compiled code, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.backends import capabilities
from deepseek_mp.inference import Form, QuantisedLinear, Served
from deepseek_mp.ops.weight_only import fastest

DEVICE = torch.device("cuda")


@pytest.fixture(params=["int8", "fp8"])
def weights(request):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "fp8" and "fp8_e4m3" not in capabilities(DEVICE).matmul_formats:
        pytest.skip("the device has no FP8")
    if fastest(DEVICE, torch.bfloat16, request.param, 512) != "triton":
        pytest.skip("no Triton kernels here")
    return request.param


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 256)).to(DEVICE).eval()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_outputs_are_those_of_the_model(model, weights, rows, compiled):
    served = Served(model, Form(format="bf16", linear=f"{weights}_weights", compiled=compiled), DEVICE)
    kept = [module for module in served.modules() if isinstance(module, QuantisedLinear)]
    assert [layer.implementation for layer in kept] == ["triton"] * 2
    x = torch.randn(rows, 512, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(served(x), model(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_graph_replays_it_with_new_inputs(model, weights, rows):
    served = Served(model, Form(format="bf16", linear=f"{weights}_weights"), DEVICE)
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
