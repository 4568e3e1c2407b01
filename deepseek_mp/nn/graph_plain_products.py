"""Products in FP8 that a captured graph has as one opaque op each become ops that a compiler sees through.

A layer does that itself when its code is compiled (`ops.fp8_linear`). The graph of an exported program has the op, and
its cast would be a launch of its own, behind a rounding to 16 bits that compiled code of the layers does not have.
"""

from __future__ import annotations

import torch
from torch import fx

from deepseek_mp.ops import fp8_linear  # noqa: F401 - it defines the op
from deepseek_mp.ops.native.fp8_linear import plain

_OP = torch.ops.deepseek_mp.fp8_linear.default


def open_products(graph: fx.GraphModule) -> int:
    """In place, in a graph as `torch.compile` gives it to a backend; how many were opaque."""
    opened = 0
    for node in graph.graph.find_nodes(op="call_function", target=_OP):
        *given, implementation = node.args
        if implementation == "native" and not node.kwargs:
            node.target, node.args = plain, tuple(given)
            opened += 1
    if opened:
        graph.recompile()
    return opened
