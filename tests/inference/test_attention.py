"""Served models run attention of few queries by our op: compiled, recorded, and from files; eager they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.inference import Form, Served, attention, load
from deepseek_mp.nn.graph_masks import contiguous_mask
from deepseek_mp.ops import few_query_attention as op

CPU = torch.device("cpu")


class Step(nn.Module):
    """A token's attention to 300 keys, in the format of its weights."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(32, 32)
        self.register_buffer("keys", torch.randn(1, 2, 300, 16))
        self.register_buffer("values", torch.randn(1, 2, 300, 16))

    def forward(self, x, at):
        query = self.query(x).view(len(x), 1, 2, 16).transpose(1, 2)
        keys, values = (part.expand(len(x), -1, -1, -1) for part in (self.keys, self.values))
        seen = (torch.arange(300, device=x.device) <= at)[None, None, None]
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        return mixed.transpose(1, 2).reshape(len(x), 32)


@pytest.fixture
def calls(recording, monkeypatch):
    """Our op is taken in BF16 on a CPU, and its calls are counted; Inductor is left out."""
    found = []
    run = op.few_query_attention_of

    def counted(name):
        found.append(name)
        return run(name)

    monkeypatch.setattr(op, "few_query_attention_of", counted)
    monkeypatch.setattr(op, "fastest", lambda device, dtype, width: "reference" if dtype is torch.bfloat16 else None)
    lookup = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lookup("aot_eager"))
    torch._dynamo.reset()
    return found


INPUTS = torch.randn(1, 32), torch.tensor([120])
FORMS = {
    "compiled": (Form(format="bf16", compiled=True), True),
    "graphed": (Form(format="bf16", graphed=True), True),
    "compiled, graphed": (Form(format="bf16", compiled=True, graphed=True), True),
    "eager": (Form(format="bf16"), False),
}


@pytest.mark.parametrize("name", FORMS)
def test_attention_is_ours_where_calls_are_compiled_or_recorded(name, calls):
    form, ours = FORMS[name]
    model = Step()
    with torch.no_grad():
        expected = model(*INPUTS)
    found = Served(model, form, CPU)(*INPUTS)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    assert bool(calls) is ours
    assert set(calls) <= {"reference"}


def test_other_formats_keep_pytorch_s_compiler(calls, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **how: asked.append(how) or call)
    for format in ("fp32", "fp16"):
        Served(Step(), Form(format=format, compiled=True), CPU)(*INPUTS)
        Served(Step(), Form(format=format, graphed=True), CPU)(*INPUTS)
    assert asked == [{}, {}]
    assert not calls
    Served(Step(), Form(format="bf16", compiled=True), CPU)
    assert asked[2]["backend"].own_attention


def test_forms_that_share_code_share_it_unrecorded(calls):
    first = Served(Step(), Form(format="bf16"), CPU)
    second = Served(first.model, Form(format="bf16", graphed=True), CPU, first)
    second(*INPUTS)
    taken = len(calls)
    assert taken
    first(*INPUTS)
    assert len(calls) == taken


def test_a_file_holds_pytorch_s_attention_and_ours_runs_when_it_is_compiled(calls, tmp_path):
    served = Served(Step(), Form(format="bf16", compiled=True), CPU)
    expected = served(*INPUTS)
    served.save(tmp_path / "model.pt2", INPUTS, dynamic=())
    calls.clear()
    model = load(tmp_path / "model.pt2", CPU)
    targets = [str(node.target) for node in model.graph.graph.nodes]
    assert "aten.scaled_dot_product_attention.default" in targets
    torch.testing.assert_close(model(*INPUTS), expected, rtol=2e-2, atol=2e-2)
    assert calls


def test_masks_of_one_column_are_written_out_in_compiled_code(calls):
    seen = []

    class Masked(nn.Module):
        def forward(self, x):
            mask = torch.ones(1, 1, 32, 1, dtype=torch.bool, device=x.device).expand(1, 1, 32, 64)
            heads = x.view(1, 1, 64, 8)
            return F.scaled_dot_product_attention(heads[:, :, :32], heads, heads, attn_mask=mask)

    def repaired(graph, choose=None):
        seen.append(graph)
        return 0

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "replace_attention", repaired)
        Served(Masked(), Form(format="bf16", compiled=True), CPU)(torch.randn(64, 8))
    names = [node.target for graph in seen for node in graph.graph.nodes]
    assert names.count(contiguous_mask) == 1
