"""What a graph computes from its weights alone, computed once; and the weights that it does not read, left out."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from deepseek_mp.qat.modes import OTHER_MODES


def fold_constants(module: fx.GraphModule) -> None:
    """Put tensors in the place of what is computed from constants, and drop parameters and buffers without a reader.

    Integers that stand for weights stay integers: what widens them stays in the graph. So does what makes a tensor
    larger than those that it is made of, and what reads state that the graph writes to.
    """
    graph = module.graph
    written = _written(graph)
    for count, node in enumerate(list(graph.nodes)):
        if _is_constant(node, written) and (value := _value(module, node)) is not None:
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


def varying(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that may give something else in every call: inputs, state that is written to, random numbers, and so on.

    What has a mode of its own, like dropout, is none for that: in evaluation it draws nothing.
    """
    written, found = _written(graph), set[fx.Node]()
    for node in graph.nodes:
        own = node.op == "placeholder" or (node.op == "get_attr" and str(node.target) in written) or _is_random(node)
        if own or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_random(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 - it has no public name
        return False
    has_mode = any(argument.name in OTHER_MODES for argument in node.target._schema.arguments)  # noqa: SLF001
    return torch.Tag.nondeterministic_seeded in node.target.tags and not has_mode


def _written(graph: fx.Graph) -> set[str]:
    """The names of tensors that the graph writes to, also through views: each call finds other values there."""
    names = set()
    for node in graph.nodes:
        reached = aliased(node) if _is_mutable(node) else []
        while reached:
            source = reached.pop()
            if source.op == "get_attr":
                names.add(str(source.target))
            reached += aliased(source)
    return names


def aliased(node: fx.Node) -> list[fx.Node]:
    """Arguments that the operation writes to, or whose memory its result shares."""
    if node.target is operator.getitem:  # one of several results
        return list(node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 - it has no public name
        return []
    places = enumerate(node.target._schema.arguments)  # noqa: SLF001
    shared = [
        node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        for index, argument in places
        if argument.alias_info is not None
    ]
    found: list[fx.Node] = []
    fx.map_arg(shared, found.append)
    return found


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable  # noqa: SLF001


def _is_constant(node: fx.Node, written: Collection[str]) -> bool:
    if node.op != "call_function" or "dequantize" in str(node.target) or not node.all_input_nodes:
        return False
    pure = isinstance(node.target, torch._ops.OpOverload) and not _is_mutable(node)  # noqa: SLF001
    kept = all(source.op == "get_attr" and str(source.target) not in written for source in node.all_input_nodes)
    return pure and not node.is_impure() and kept


def _value(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    given: Any = {source: operator.attrgetter(str(source.target))(module) for source in node.all_input_nodes}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: given[source])
    target: Any = node.target
    value = target(*args, **kwargs)
    room = max(tensor.numel() for tensor in given.values())
    return value.detach().clone() if isinstance(value, Tensor) and value.numel() <= room else None


def _drop_unread(module: fx.GraphModule) -> None:
    module.delete_all_unused_submodules()
    read = {id(operator.attrgetter(str(node.target))(module)) for node in module.graph.find_nodes(op="get_attr")}
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if id(tensor) not in read:
                delattr(part, name)
