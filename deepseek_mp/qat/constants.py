"""What a graph computes from its weights alone, computed once; and the weights that it does not read, left out."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx


def fold_constants(module: fx.GraphModule) -> None:
    """Put tensors in the place of what is computed from constants, and drop parameters and buffers without a reader.

    Integers that stand for weights stay integers: what widens them stays in the graph. So does what makes a tensor
    larger than those that it is made of.
    """
    graph = module.graph
    for count, node in enumerate(list(graph.nodes)):
        if _is_constant(node) and (value := _value(module, node)) is not None:
            name = f"_constant_{count}"
            module.register_buffer(name, value)
            with graph.inserting_before(node):
                made = graph.get_attr(name)
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    for node in reversed(list(graph.find_nodes(op="get_attr"))):
        if not node.users:
            graph.erase_node(node)
    _drop_unread(module)
    module.recompile()


def _is_constant(node: fx.Node) -> bool:
    if node.op != "call_function" or "dequantize" in str(node.target) or not node.all_input_nodes:
        return False
    pure = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable  # noqa: SLF001
    return pure and not node.is_impure() and all(source.op == "get_attr" for source in node.all_input_nodes)


def _value(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    given: Any = {source: attrgetter(str(source.target))(module) for source in node.all_input_nodes}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: given[source])
    target: Any = node.target
    value = target(*args, **kwargs)
    room = max(tensor.numel() for tensor in given.values())
    return value.detach().clone() if isinstance(value, Tensor) and value.numel() <= room else None


def _drop_unread(module: fx.GraphModule) -> None:
    module.delete_all_unused_submodules()
    read = {id(attrgetter(str(node.target))(module)) for node in module.graph.find_nodes(op="get_attr")}
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if id(tensor) not in read:
                delattr(part, name)
