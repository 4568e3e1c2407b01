"""Compiled served models join layers of one input, say which, and stay right when their weights change or move."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F

from deepseek_mp.inference import Form, Served, attention, load
from deepseek_mp.inference.beside import lay_beside, lie_beside
from deepseek_mp.inference.compiling import Compiler, compiler_for
from deepseek_mp.ops import fp8_linear, int4_linear

CPU = torch.device("cpu")
FORM = Form(format="bf16", linear="fp8_weights", compiled=True)
JOINED = (("block.q", "block.k", "block.v"), ("block.gate", "block.up"))


class Block(nn.Module):
    """Attention's projections and a gated layer, with a cache that a call writes to."""

    def __init__(self, bias=False):
        super().__init__()
        self.q = nn.Linear(256, 512, bias=bias)
        self.k, self.v = (nn.Linear(256, 256, bias=bias) for _ in range(2))
        self.gate, self.up, self.down = nn.Linear(256, 768), nn.Linear(256, 768), nn.Linear(768, 256)
        self.register_buffer("cache", torch.zeros(4, 256))

    def forward(self, x):
        query, key, value = self.q(x), self.k(x), self.v(x)
        self.cache.index_copy_(0, torch.tensor([1]), value[:, -1])
        mixed = query[..., :256] * key + value + self.cache.sum(0)
        return self.down(F.silu(self.gate(mixed)) * self.up(mixed))


class Model(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.block = Block(bias)

    def forward(self, x):
        return self.block(x)


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch):
    """Inductor is left out, so that outputs are those of the layers bit for bit but for the order of sums."""
    lookup = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lookup("aot_eager"))
    torch._dynamo.reset()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["int8_weights", "fp8_weights", "fp8"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_served_models_join_layers_and_say_which(kind, bias):
    model = Model(bias)
    eager = Served(model, Form(format="bf16", linear=kind), CPU)
    served = Served(model, Form(format="bf16", linear=kind, compiled=True), CPU)
    assert served.joined == ()
    for rows in (1, 3, 5):
        x = torch.randn(1, rows, 256)
        close(served(x), eager(x))
        close(served.model.block.cache, eager.model.block.cache)
    assert set(served.joined) == set(JOINED)
    assert eager.joined == ()


def test_kinds_by_name_are_joined_where_they_are_the_same():
    kinds = {"gate": "int8_weights", "up": "int8_weights", "q": "fp8_weights", "k": "int8_weights", "v": "fp8_weights"}
    form = Form(format="bf16", layers=tuple((f"block.{name}", kind) for name, kind in kinds.items()), compiled=True)
    model, x = Model(), torch.randn(1, 3, 256)
    served = Served(model, form, CPU)
    close(served(x), Served(model, Form(format="bf16", layers=form.layers), CPU)(x))
    assert set(served.joined) == {("block.gate", "block.up"), ("block.q", "block.v")}


def test_weights_that_are_loaded_are_read():
    served, other, x = Served(Model(), FORM, CPU), Served(Model(), FORM, CPU), torch.randn(1, 3, 256)
    served(x)
    served.load_state_dict(other.state_dict())
    assert torch.equal(served(x), other(x))


def test_copies_join_their_own(monkeypatch):
    served, x = Served(Model(True), FORM, CPU), torch.randn(1, 3, 256)
    expected = served(x)
    made = copy.deepcopy(served)
    assert torch.equal(made(x), expected)
    assert set(made.joined) == set(JOINED)
    made.model.block.q.q.zero_()
    assert torch.equal(served(x), expected)
    assert not torch.equal(made(x), expected)


def test_weights_that_are_moved_make_code_anew():
    served, x = Served(Model(), FORM, CPU), torch.randn(1, 3, 256)
    expected = served(x)
    code = served._plain
    served._apply(lambda tensor: tensor)
    assert served._plain is code
    served._apply(torch.clone)
    assert served._plain is not code
    torch.testing.assert_close(served(x), expected)
    assert served.joined == ()


def test_loaded_files_are_joined_too(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(Compiler, "__call__", _noting(Compiler.__call__, found))
    served, x = Served(Model(True), FORM, CPU), torch.randn(1, 3, 256)
    served.save(tmp_path / "model.pt2", (x,), dynamic=(1,))
    loaded = load(tmp_path / "model.pt2", CPU)
    with served.kept_state():
        expected = served(x)
    assert torch.equal(loaded(x), expected)
    assert [sorted(map(len, compiler._joined)) for compiler in found] == [[2, 3], [2, 3]]


def _noting(call, found):
    def noting(self, graph, inputs):
        found.append(self)
        return call(self, graph, inputs)

    return noting


RECORDED = replace(FORM, graphed=True)


@pytest.mark.usefixtures("recording")
def test_recorded_calls_read_the_joined_weights_of_later_loads():
    served, other, x = Served(Model(), RECORDED, CPU), Served(Model(), FORM, CPU), torch.randn(1, 1, 256)
    served(x)
    assert set(served.joined) == set(JOINED)
    graph = served._graphed
    served.load_state_dict(other.state_dict())
    assert torch.equal(served(x), other(x))
    assert served._graphed is graph
    assert len(graph) == 1


@pytest.mark.usefixtures("recording")
def test_weights_that_take_the_place_of_others_are_laid_and_recorded_anew():
    served, other, x = Served(Model(), RECORDED, CPU), Served(Model(), FORM, CPU), torch.randn(1, 1, 256)
    holder = nn.ModuleList([copy.deepcopy(served)])
    for run, state in ((served, ""), (holder, "0.")):
        (served if run is served else holder[0])(x)
        given = {state + name: value.clone() for name, value in other.state_dict().items()}
        run.load_state_dict(given, assign=True)
    for made in (served, holder[0]):
        assert len(made._graphed) == 0
        assert torch.equal(made(x), other(x))
        assert set(made.joined) == set(JOINED)
        assert lie_beside(made.model, JOINED[0])


def test_weights_are_laid_before_code_is_made():
    served = Served(Model(), FORM, CPU)
    before = [part.data_ptr() for part in served.buffers()]
    served(torch.randn(1, 3, 256))
    lay_beside(served.model)
    assert [part.data_ptr() for part in served.buffers()] == before
    assert lie_beside(served.model, JOINED[0])


def test_forms_without_kinds_keep_pytorch_s_compiler(monkeypatch):
    assert compiler_for(nn.Identity(), CPU, Form(compiled=True)) is None
    assert compiler_for(nn.Identity(), CPU, FORM) is not None
    monkeypatch.setattr(attention, "is_rewritten", lambda device, format: True)
    assert compiler_for(nn.Identity(), CPU, Form(compiled=True)).own_attention


class Branching(nn.Module):
    """A layer of three of one input in each branch of `torch.cond`, which refuses inputs of one memory."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(256, 256) for _ in range(3))

    def forward(self, x):
        chosen = torch.cond(x.sum() > 0, lambda x: self.c(x) * 1, lambda x: self.a(x) * 2, (x,))
        return chosen, self.a(x), self.b(x)


@pytest.mark.parametrize("kind", ["int8_weights", "fp8", "int4_weights"])
def test_layers_beside_each_other_may_be_in_branches(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(int4_linear, "fastest", lambda *sizes: "reference")
    model, x = Branching(), torch.randn(3, 256)
    eager = Served(model, Form(format="bf16", linear=kind), CPU)
    served = Served(model, Form(format="bf16", linear=kind, compiled=True), CPU)
    served.save(tmp_path / "model.pt2", x)
    loaded = load(tmp_path / "model.pt2", CPU)
    for one in (x.abs(), -x.abs()):
        expected = eager(one)
        for run in (served, loaded):
            for out, right in zip(run(one), expected, strict=True):
                close(out, right)
    assert served.joined == (("a", "b"),)
    for part in (served.model.c.scale, *([served.model.c.zero] if kind == "int4_weights" else [])):
        part.zero_()
    close(served(x.abs())[0], torch.zeros(3, 256) + served.model.c.bias.float())


@pytest.mark.skipif(not fp8_linear._native_is_right(CPU, torch.bfloat16), reason="no FP8 product by row here")
def test_fp8_products_of_files_are_compiled_as_those_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_linear, "fastest", lambda *_where: "native")
    served, x = Served(Model(), Form(format="bf16", linear="fp8", compiled=True), CPU), torch.randn(1, 3, 256)
    served.save(tmp_path / "model.pt2", (x,))
    loaded = load(tmp_path / "model.pt2", CPU)
    monkeypatch.delattr(fp8_linear, "fp8_linear_of")  # what the opaque op runs
    assert torch.equal(loaded(x), served(x))
