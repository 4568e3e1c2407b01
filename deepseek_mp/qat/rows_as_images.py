"""Convolutions of rows in INT8 as convolutions of images one pixel high, which the compiler has whole kernels for.

Of those of rows it takes padding for an output that is longer, so that it fails at what reads one beside a tensor of
the right length, such as a shortcut; and its kernel has no ReLU6, Hardswish or SiLU, which its passes put there.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_FUSED = {
    aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default, aten.gelu.default,
    aten.silu.default, aten.silu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.hardswish.default,
    aten.hardswish_.default,
}  # fmt: skip
"""What the kernel of a convolution does beside its product, each value by itself."""
HEIGHT = -2
"""The dimension of one, also without a batch."""


def rows_as_images(module: fx.GraphModule) -> None:
    """Change those convolutions of rows that read a quantised input and weight; the values stay the same."""
    graph = module.graph
    for count, node in enumerate(list(graph.find_nodes(op="call_function", target=aten.conv1d.default))):
        x, weight = node.args[:2]
        if not (_is_widened(x) and _is_widened(weight) and weight.args[0].op == "get_attr"):
            continue
        name = f"_image_{count}"
        module.register_buffer(name, attrgetter(str(weight.args[0].target))(module).unsqueeze(HEIGHT))
        with graph.inserting_before(node):
            kept = graph.get_attr(name)
            image = graph.call_function(weight.target, (kept, *weight.args[1:]), weight.kwargs)
            high = graph.call_function(x.target, (_high(graph, x.args[0]), *x.args[1:]), x.kwargs)
        given: Any = (*node.args[2:], *(None, [1], [0], [1], 1)[len(node.args) - 2 :])
        bias, stride, padding, dilation, groups = given
        node.args = (high, image, bias, [1, *stride], [0, *padding], [1, *dilation], groups)
        node.target = aten.conv2d.default
        _flatten(graph, node)
    graph.eliminate_dead_code()
    module.recompile()


def _is_widened(node: Any) -> bool:
    """Whether it gives the values that integers stand for."""
    return isinstance(node, fx.Node) and "dequantize" in str(node.target)


def _high(graph: fx.Graph, rows: Any) -> fx.Node:
    """Rows as images: what they were made of, where they were images."""
    if rows.target is aten.squeeze.dim:
        source: fx.Node = rows.args[0]
        if source.meta.get("is_image"):
            return source
    return graph.call_function(aten.unsqueeze.default, (rows, HEIGHT))


def _flatten(graph: fx.Graph, node: fx.Node) -> None:
    """Make rows of the result, behind all that the kernel does with it."""
    last = node
    while len(last.users) == 1:
        (user,) = last.users
        if not (user.target in _FUSED or ".quantize_per_tensor" in str(user.target)) or user.args[0] is not last:
            break
        last = user
    last.meta["is_image"] = True
    with graph.inserting_after(last):
        rows = graph.call_function(aten.squeeze.dim, (last, HEIGHT))
    last.replace_all_uses_with(rows, delete_user_cb=lambda user: user is not rows)
