"""Layers of one input as one product on a GPU: near what they give apart, in their own memory, in fewer launches."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.costs.memory import distinct_bytes
from deepseek_mp.inference import Form, Served, load
from deepseek_mp.inference.compiling import Compiler
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.quantised_linear import linear_kinds
from deepseek_mp.nn import graph_linear

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
ROWS = (1, 2, 17, 65, 512)
ROUNDING = 1.5e-2
"""Norm of what other tiles and sums in another order do to outputs of compiled code, relative to them."""
CHANCE = 1.2
"""By how much errors of the same size may differ: rounded elsewhere, some of a row are smaller and some larger."""


class Block(nn.Module):
    """The layers of a block of Llama with grouped heads, without attention and without a shortcut, whose rounding in
    BF16 would be larger than what is looked for."""

    def __init__(self, bias):
        super().__init__()
        self.q = nn.Linear(1024, 1024, bias=bias)
        self.k, self.v = (nn.Linear(1024, 256, bias=bias) for _ in range(2))
        self.gate, self.up = (nn.Linear(1024, 2816, bias=False) for _ in range(2))
        self.down = nn.Linear(2816, 1024, bias=False)
        for layer in self.children():  # a channel with another one's scale or bias is far off
            layer.weight.data.mul_(torch.rand(layer.out_features, 1) + 0.5)
            if layer.bias is not None:
                nn.init.normal_(layer.bias)

    def forward(self, x):
        query, key, value = self.q(x), self.k(x), self.v(x)
        mixed = query * torch.cat([key, value], dim=-1).repeat(1, 1, 2)
        return self.down(F.silu(self.gate(mixed)) * self.up(mixed))


@pytest.fixture(params=KINDS)
def kind(request):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param not in linear_kinds(Block(False).to(DEVICE), BF16, DEVICE):
        pytest.skip(f"no product of {request.param} here")
    return request.param


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def model(request):
    return Block(request.param).to(DEVICE).eval()


def uncombined(served, x):
    """A compiled model's outputs, whose layers are not joined if it is compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_linear, "together", lambda parts, dim: None)
        return served(x)


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("graphed", [False, True], ids=["", "graphed"])
def test_outputs_are_near_those_of_layers_apart(model, kind, graphed):
    apart = Served(model, Form(format="bf16", linear=kind, compiled=True), DEVICE)
    served = Served(model, Form(format="bf16", linear=kind, compiled=True, graphed=graphed), DEVICE)
    for rows in ROWS:
        x = torch.randn(1, rows, 1024, device=DEVICE)
        assert distance(served(x), uncombined(apart, x)) < ROUNDING, rows
    assert set(served.joined) == {("q", "k", "v"), ("gate", "up")}
    assert not apart.joined


def test_outputs_are_as_near_the_models_own_as_those_of_eager_layers(model, kind):
    """Which need not be near each other: before it rounds to FP8, in steps of some percent, compiled code does not
    round to BF16, so that a part of the values goes the other way."""
    eager = Served(model, Form(format="bf16", linear=kind), DEVICE)
    served = Served(model, Form(format="bf16", linear=kind, compiled=True), DEVICE)
    exact = copy.deepcopy(model).double()
    for rows in ROWS:
        x = torch.randn(1, rows, 1024, device=DEVICE)
        with torch.no_grad():
            expected = exact(x.double())
        assert distance(served(x), expected) < CHANCE * distance(eager(x), expected), rows


def test_no_memory_is_added(model, kind):
    served = Served(model, Form(format="bf16", linear=kind, compiled=True), DEVICE)
    parts = [*served.parameters(), *served.buffers()]
    served(torch.randn(1, 1, 1024, device=DEVICE))
    assert distinct_bytes(parts) == sum(part.numel() * part.element_size() for part in parts)


def test_weights_that_are_loaded_are_read_by_recorded_calls(model, kind):
    form = Form(format="bf16", linear=kind, compiled=True, graphed=True)
    served, other = Served(model, form, DEVICE), Served(Block(model.q.bias is not None).to(DEVICE), form, DEVICE)
    x = torch.randn(1, 1, 1024, device=DEVICE)
    served(x)
    served.load_state_dict(other.state_dict())
    assert torch.equal(served(x), other(x))


def test_files_are_joined_on_the_device(model, kind, tmp_path, monkeypatch):
    joined = []
    call = Compiler.__call__
    monkeypatch.setattr(Compiler, "__call__", lambda self, *how: (call(self, *how), joined.append(self._joined))[0])
    served = Served(model, Form(format="bf16", linear=kind, compiled=True), DEVICE)
    # Numbers that BF16 has: the file's code casts its input inside, and to FP8 without a rounding to BF16 between.
    x = torch.randn(1, 3, 1024, device=DEVICE, dtype=BF16).float()
    served.save(tmp_path / "model.pt2", (x,), dynamic=(1,))
    loaded = load(tmp_path / "model.pt2", DEVICE)
    assert distance(loaded(x), served(x)) < ROUNDING
    assert [sorted(map(len, groups)) for groups in joined] == [[2, 3], [2, 3]]


@pytest.mark.parametrize("rows", [1, 512])
def test_a_call_has_fewer_launches(model, kind, rows):
    x = torch.randn(1, rows, 1024, device=DEVICE)
    form = Form(format="bf16", linear=kind, compiled=True)
    joined = launches(Served(model, form, DEVICE), x)
    apart = launches(partial(uncombined, Served(model, form, DEVICE)), x)
    assert joined <= apart - 3, "two products of attention's three, one of the gated layer's two"


def launches(call, x):
    """Kernels of a call."""
    for _ in range(3):
        call(x)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        call(x)
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels
    return len(kernels)
