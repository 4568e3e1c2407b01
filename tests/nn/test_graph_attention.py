"""Attention in captured graphs: ours in its place gives PyTorch's numbers, and calls that do not suit stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.nn.graph_attention import replace_attention

BF16 = torch.bfloat16


class Compiled:
    """`torch.compile` with the calls replaced; counts them, for each graph."""

    def __init__(self, function, **options):
        torch._dynamo.reset()
        self.replaced, self.graphs = [], []
        self.call = torch.compile(function, backend=self._backend, fullgraph=True, **options)

    def _backend(self, graph, example_inputs):
        self.replaced.append(replace_attention(graph, lambda device, dtype, width: "reference"))
        graph.graph.lint()
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


class Step(nn.Module):
    """A token's attention to a cache that it writes to."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads = heads
        self.register_buffer("keys", torch.randn(1, 2, 300, 16))
        self.register_buffer("values", torch.randn(1, 2, 300, 16))

    def forward(self, x, at):
        query, key, value = x.split((self.heads * 16, 32, 32), dim=-1)
        self.keys.index_copy_(2, at, key.view(1, 1, 2, 16).transpose(1, 2))
        self.values.index_copy_(2, at, value.view(1, 1, 2, 16).transpose(1, 2))
        seen = (torch.arange(300) <= at)[None, None, None]
        query = query.view(1, 1, self.heads, 16).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=seen, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(1, 1, self.heads * 16)


@torch.no_grad()
def test_a_token_s_step_with_a_cache():
    step, x, at = Step().to(BF16), torch.randn(1, 1, 128).to(BF16), torch.tensor([7])
    expected = step(x, at)
    kept = step.keys.clone()
    compiled = Compiled(step)
    torch.testing.assert_close(compiled.call(x, at), expected, rtol=2**-7, atol=2**-8)
    assert compiled.replaced == [1]
    assert torch.equal(step.keys, kept)


def attend(query, key, value, seen):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen) * 2


def given(keys, queries=1, batch=2):
    parts = [torch.randn(batch, 4, length, 16).to(BF16) for length in (queries, keys, keys)]
    return (*parts, torch.rand(batch, 1, queries, keys) < 0.5)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [((300, 2), (301, 2), (350, 2), (420, 2)), ((300, 2), (300, 3), (300, 5))])
def test_caches_and_batches_that_grow_are_served_by_one_graph(sizes):
    compiled = Compiled(attend)
    for keys, batch in sizes:
        parts = given(keys, batch=batch)
        torch.testing.assert_close(compiled.call(*parts), attend(*parts), rtol=2**-6, atol=2**-6)
    assert compiled.replaced == [1, 1]


@torch.no_grad()
def test_programs_that_were_exported():
    class Attend(nn.Module):
        def forward(self, *parts):
            return attend(*parts)

    parts = given(300)
    program = torch.export.export(Attend(), parts).module()
    compiled = Compiled(program)
    torch.testing.assert_close(compiled.call(*parts), attend(*parts), rtol=2**-6, atol=2**-6)
    assert compiled.replaced == [1]


def test_what_does_not_suit_stays():
    with torch.no_grad():
        for call, parts in (
            (attend, given(300, queries=17)),
            (attend, given(200)),
            (lambda *given: F.scaled_dot_product_attention(*given[:3]), given(300)),
        ):
            compiled = Compiled(call)
            compiled.call(*parts)
            assert compiled.replaced == [0]


def test_what_has_a_gradient_stays():
    compiled = Compiled(attend)
    query, *rest = given(300)
    compiled.call(query.requires_grad_(), *rest).sum().backward()
    assert compiled.replaced == [0]
    assert query.grad is not None


def test_what_has_a_gradient_inside_stays():
    def differentiable(*parts):
        with torch.enable_grad():
            return attend(*parts)

    compiled = Compiled(differentiable)
    query, *rest = given(300)
    with torch.no_grad():
        compiled.call(query.requires_grad_(), *rest)
    assert compiled.replaced == [0]


def test_graphs_inside_the_graph():
    def whole(*parts):
        return checkpoint(attend, *parts, use_reentrant=False)

    parts = given(300)
    compiled = Compiled(whole)
    torch.testing.assert_close(compiled.call(*parts), attend(*parts), rtol=2**-6, atol=2**-6)
    assert compiled.replaced == [1]
