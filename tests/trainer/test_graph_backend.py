"""The repair of captured graphs: attention masks become what fused kernels take, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.nn import convert
from deepseek_mp.nn.graph_masks import contiguous_mask
from deepseek_mp.nn.graph_pooling import replace_pools
from deepseek_mp.trainer import graph_backend, recompute_costs
from deepseek_mp.trainer.graph_backend import backend, inductor

B, H, Q, K, D = 2, 3, 8, 16, 4


def qkv(*, grad=False):
    return [torch.randn(B, H, n, D, requires_grad=grad) for n in (Q, K, K)]


MASKS = {
    "one column for all keys": lambda: torch.ones(1, 1, Q, 1, dtype=torch.bool).expand(B, 1, Q, K),
    "a transposed bias": lambda: torch.randn(B, H, K, Q).mT,
    "one row for all queries, every second value": lambda: torch.randn(1, 1, 1, 2 * K)[..., ::2].expand(B, H, Q, K),
    "two dimensions": lambda: torch.randn(Q, 1).expand(Q, K),
}


class Graphs(list):
    patches = None
    """Settings that the backend asked for along with the last graph."""


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that Inductor would get; they run as they are."""
    seen = Graphs()

    def compiler(graph, inputs, config_patches=None):
        seen.append(graph)
        seen.patches = config_patches
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: compiler)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def repairs(graphs):
    return sum(
        node.target is contiguous_mask
        for graph in graphs
        for part in graph.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
    )


@pytest.mark.parametrize("named", [False, True], ids=["positional", "named"])
@pytest.mark.parametrize("mask", MASKS)
def test_compiled_attention_gives_the_same_with_a_repaired_mask(graphs, mask, named):
    mask = MASKS[mask]()

    def attention(q, k, v):
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) if named else 0
        return x + F.scaled_dot_product_attention(q, k, v, mask, 0.0)

    for x in (inputs := qkv(grad=True)):
        x.grad = None
    expected = torch.autograd.grad((y := attention(*inputs)).square().sum(), inputs)
    z = torch.compile(attention, backend=inductor)(*inputs)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(torch.autograd.grad(z.square().sum(), inputs), expected)
    assert repairs(graphs) == 1


def test_a_learned_bias_gets_its_whole_gradient(graphs):
    q, k, v = qkv()
    bias = torch.randn(1, H, Q, 1, requires_grad=True)

    def loss(bias):
        return F.scaled_dot_product_attention(q, k, v, bias.expand(B, H, Q, K) * 1).square().sum()

    def shared(bias):
        return F.scaled_dot_product_attention(q, k, v, bias.mT.repeat(1, 1, K, 1).mT.expand(B, H, Q, K)).square().sum()

    for function in (loss, shared):
        (expected,) = torch.autograd.grad(function(bias), bias)
        (found,) = torch.autograd.grad(torch.compile(function, backend=inductor)(bias), bias)
        torch.testing.assert_close(found, expected)
    assert repairs(graphs) >= 1


@pytest.mark.parametrize("mask", [None, torch.ones(Q, K, dtype=torch.bool), torch.zeros(B, 1, 1, K), torch.zeros(Q, 1)])
def test_masks_that_are_taken_stay_as_they_are(graphs, mask):
    attention = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), backend=inductor)
    attention(*qkv())
    assert len(graphs) == 1
    assert repairs(graphs) == 0


class Checkpointed(nn.Module):
    def forward(self, q, k, v):
        mask = torch.ones(1, 1, Q, 1, dtype=torch.bool).expand(B, 1, Q, K)
        return checkpoint(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), q, k, v, use_reentrant=False)


def test_masks_of_checkpointed_regions_are_repaired(graphs):
    inputs = qkv(grad=True)
    torch.compile(Checkpointed(), backend=inductor)(*inputs).sum().backward()
    assert repairs(graphs) == 1


def test_the_pass_of_the_caller_is_not_replaced_by_ours(graphs):
    x = torch.randn(3)
    torch.compile(torch.sin, backend=inductor)(x)
    assert list(graphs.patches) == ["joint_custom_pre_pass"]
    torch._dynamo.reset()
    with torch._inductor.config.patch(joint_custom_pre_pass=lambda graph: None):
        torch.compile(torch.cos, backend=inductor)(x)
    assert len(graphs) == 2
    assert graphs.patches is None


class Pooled(nn.Module):
    def forward(self, x):
        y = F.max_pool2d(x, 2)
        return checkpoint(lambda y: F.max_pool2d(y * y, 3, 2, 1), y, use_reentrant=False)


def test_pools_become_ours_where_there_is_an_implementation(graphs, monkeypatch):
    x = torch.randn(2, 8, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    torch.compile(Pooled(), backend=inductor)(x)
    assert "max_pool2d.default" not in str(graphs[0])  # a CPU has no kernels
    torch._dynamo.reset()
    monkeypatch.setattr(graph_backend, "replace_pools", lambda part: replace_pools(part, lambda *_: "reference"))
    found = torch.compile(Pooled(), backend=inductor)(x)
    pools = [n for part in graphs[1].modules() for n in part.graph.nodes if str(n.target).startswith("deepseek_mp")]
    assert len(pools) == 2
    torch.testing.assert_close(found, Pooled()(x), rtol=0, atol=0)


def kept_and_gradient(model, x, budget):
    """Bytes that the compiled model keeps for its backward, and the gradient of x."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = torch.compile(model, backend=backend(budget))(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return sum(kept), gradient


def test_under_a_budget_less_is_kept_and_the_rest_computed_again(partitioned):
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(32, 32), nn.GELU())]
    model, x = nn.Sequential(*layers), torch.randn(512, 32, requires_grad=True)
    (whole, plain), (half, again) = kept_and_gradient(model, x, None), kept_and_gradient(model, x, 0.5)
    assert half <= 0.65 * whole  # the budget leaves the input out of account
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


class Attention(nn.Module):
    def forward(self, x):
        query, key, value = x.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("mode", "most"), [("block", 2), ("bf16", 1)])
def test_products_are_not_taken_for_free(backward, mode, most, monkeypatch):
    """Each of five layers has two in its backward; what is computed again is mostly the elementwise work in between."""
    monkeypatch.setattr(recompute_costs, "LAUNCH_BYTES", 0.0)  # as if the layers were wide
    monkeypatch.setattr(recompute_costs, "FLOPS_PER_BYTE", dict.fromkeys(recompute_costs.FLOPS_PER_BYTE, 1.0))
    layers = [part for _ in range(4) for part in (nn.Linear(128, 128), nn.GELU())]
    model = nn.Sequential(nn.Linear(128, 384), Attention(), nn.GELU(), *layers)
    convert(model, mode, emulate=True)
    x = torch.randn(16, 64, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=backend(0.8))(x).sum().backward()
    assert sum("product" in name or "aten.mm" in name for name in backward) <= 2 * 5 + most
    assert any("erf" in name for name in backward)


def test_a_budget_has_one_backend_and_ends_with_the_compilation():
    from torch._functorch import config as partitioner

    assert backend(None) is inductor
    assert backend(0.5) is backend(0.5)
    assert partitioner.activation_memory_budget == 1.0
