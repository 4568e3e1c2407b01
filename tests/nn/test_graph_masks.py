"""Masks that fused attention takes, in graphs that are only evaluated too."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.nn.graph_masks import contiguous_mask, repair_masks

B, H, Q, K, D = 2, 3, 8, 16, 4
MASKS = {
    "one column for all keys": lambda: torch.ones(1, 1, Q, 1, dtype=torch.bool).expand(B, 1, Q, K),
    "a transposed bias": lambda: torch.randn(B, H, K, Q).mT,
    "one row for all queries, every second value": lambda: torch.randn(1, 1, 1, 2 * K)[..., ::2].expand(B, H, Q, K),
    "two dimensions": lambda: torch.randn(Q, 1).expand(Q, K),
}


@pytest.mark.parametrize("mask", MASKS)
def test_the_repaired_mask_broadcasts_to_the_same(mask):
    mask = MASKS[mask]()
    repaired = contiguous_mask(mask)
    assert repaired.stride(-1) == 1
    assert torch.equal(repaired.expand(mask.shape), mask)
    assert repaired.numel() == mask.numel() // max(
        1, torch.Size([n for n, stride in zip(mask.shape[:-2], mask.stride()[:-2], strict=True) if stride == 0]).numel()
    )


class Compiled:
    """`torch.compile` with repaired masks; counts them, for each graph."""

    def __init__(self, function):
        torch._dynamo.reset()
        self.repaired = []
        self.call = torch.compile(function, backend=self._backend, fullgraph=True)

    def _backend(self, graph, _inputs):
        repair_masks(graph)
        graph.graph.lint()
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        self.repaired.append([sum(node.target is contiguous_mask for node in part.graph.nodes) for part in parts])
        return graph.forward


def operands():
    return [torch.randn(B, H, n, D) for n in (Q, K, K)]


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_is_written_into_a_mask_before_it_is_read_is_in_it(region):
    def attention(bias, hidden, q, k, v):
        mask = bias.clone().mT
        mask.masked_fill_(hidden, -torch.inf)
        one = F.scaled_dot_product_attention(q, k, v, mask)
        mask[:, :, :, 0] = 3.0
        return one + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    given = torch.randn(B, H, K, Q), torch.rand(B, 1, 1, K) < 0.5, *operands()
    with region():
        compiled = Compiled(attention)
        torch.testing.assert_close(compiled.call(*given), attention(*given))
    assert compiled.repaired == [[2]]


@torch.no_grad()
def test_programs_that_were_exported():
    class Attend(torch.nn.Module):
        def forward(self, column, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=column.expand(B, 1, Q, K))

    given = torch.rand(1, 1, Q, 1) < 0.9, *operands()
    program = torch.export.export(Attend(), given).module()
    compiled = Compiled(program)
    torch.testing.assert_close(compiled.call(*given), program(*given))
    assert compiled.repaired == [[1]]


def test_graphs_inside_the_graph():
    def attention(column, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=column.expand(B, 1, Q, K))

    def whole(*parts):
        return checkpoint(attention, *parts, use_reentrant=False)

    given = torch.rand(1, 1, Q, 1) < 0.9, *operands()
    compiled = Compiled(whole)
    torch.testing.assert_close(compiled.call(*given), attention(*given))
    assert sorted(compiled.repaired[0]) == [0, 1]


@pytest.mark.parametrize("mask", MASKS)
def test_a_graph_without_gradients_is_repaired_once(mask):
    mask = MASKS[mask]()

    def attention(q, k, v, mask):
        one = F.scaled_dot_product_attention(q, k, v, mask)
        return one + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    compiled = Compiled(attention)
    with torch.no_grad():
        q, k, v = operands()
        torch.testing.assert_close(compiled.call(q, k, v, mask), attention(q, k, v, mask))
    assert compiled.repaired == [[1]]
