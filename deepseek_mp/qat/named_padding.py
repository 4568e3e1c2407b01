"""Convolutions whose padding has a name, 'same' or 'valid', with that padding in numbers, as torchao knows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_IN_NUMBERS = {aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default}


def number_paddings(module: fx.GraphModule) -> None:
    """Change such convolutions of the graph in place; where sides differ, zeros are put around the input before."""
    for node in module.graph.nodes:
        if node.target in _IN_NUMBERS:
            _number(module.graph, node)
    module.recompile()


def _number(graph: fx.Graph, node: fx.Node) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr] # noqa: SLF001
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, weight = given["input"], given["weight"]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    kernel = weight.meta["val"].shape[2:]
    dilation: Any = given.get("dilation", [1])
    dilation = list(dilation) * len(kernel) if len(dilation) == 1 else list(dilation)
    same = given.get("padding", "valid") == "same"
    totals = [step * (int(size) - 1) if same else 0 for step, size in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):  # PyTorch has the odd one at the end
        around = [side for total in reversed(totals) for side in (0, total % 2)]
        with graph.inserting_before(node):
            padded = graph.call_function(aten.constant_pad_nd.default, (x, around))
        padded.meta = {**node.meta, "val": aten.constant_pad_nd.default(x.meta["val"], around)}
        x = padded
    stride = given.get("stride", [1] * len(kernel))
    padding = [total // 2 for total in totals]
    node.args = (x, weight, given.get("bias"), stride, padding, dilation, given.get("groups", 1))
    node.kwargs = {}
    node.target = _IN_NUMBERS[node.target]  # type: ignore[index]
