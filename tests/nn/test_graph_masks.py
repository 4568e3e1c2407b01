"""Masks that fused attention takes, in graphs that are only evaluated too."""

import pytest
import torch
from torch.nn import functional as F

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


@pytest.mark.parametrize("mask", MASKS)
def test_a_graph_without_gradients_is_repaired_once(mask):
    mask, seen = MASKS[mask](), []
    q, k, v = (torch.randn(B, H, n, D) for n in (Q, K, K))

    def backend(graph, _inputs):
        repair_masks(graph)
        seen.append(sum(node.target is contiguous_mask for node in graph.graph.nodes))
        return graph.forward

    def attention(q, k, v, mask):
        one = F.scaled_dot_product_attention(q, k, v, mask)
        return one + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(attention, backend=backend)(q, k, v, mask)
        torch.testing.assert_close(found, attention(q, k, v, mask))
    assert seen == [1]
