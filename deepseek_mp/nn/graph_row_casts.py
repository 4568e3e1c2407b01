"""Rows that several FP8 products of a captured graph read are cast once.

The compiler does not find out that casts of one tensor are the same. Products of layers whose weights lie beside each
other are one anyway (`nn.graph_linear`); this is for those that are left, such as one with a bias beside one without.
"""

from __future__ import annotations

import operator

from torch import fx

from deepseek_mp.nn.graph_products import Product, same_input
from deepseek_mp.ops.native.fp8_linear import cast_product, plain, plain_row_cast


def share_row_casts(graph: fx.GraphModule) -> int:
    """In place, in a graph as `torch.compile` gives it to a backend; how many casts are fewer."""
    spared = 0
    for group in same_input(graph.graph, alike=False):
        if group[0].target is plain and len(group) > 1:
            _share(graph.graph, group)
            spared += len(group) - 1
    if spared:
        graph.recompile()
    return spared


def _share(graph: fx.Graph, group: list[Product]) -> None:
    with graph.inserting_before(group[0].node):
        cast = graph.call_function(plain_row_cast, (graph.call_method("contiguous", (group[0].given["x"],)),))
        values, scale = (graph.call_function(operator.getitem, (cast, place)) for place in range(2))
    for product in group:
        node, given = product.node, product.given
        dtype = node.meta["example_value"].dtype
        with graph.inserting_before(node):
            made = graph.call_function(cast_product, (values, scale, given["q"], given["scale"], given["bias"], dtype))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
