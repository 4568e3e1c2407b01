"""Sums of a tensor with itself as products with two, which are the same bit for bit."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_PRODUCTS = {aten.add.Tensor: aten.mul.Tensor, aten.add_.Tensor: aten.mul_.Tensor}


def double(module: fx.GraphModule) -> None:
    """Change such sums of the graph in place: torchao's passes for the compiler fail at one behind a layer."""
    for node in module.graph.nodes:
        if node.target in _PRODUCTS and node.args[0] is node.args[1] and not node.kwargs:
            node.target = _PRODUCTS[node.target]
            node.update_arg(1, 2)
    module.recompile()
