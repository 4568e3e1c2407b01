"""Regions of a forward under `torch.no_grad`, or with autocast off, as a part of the model's graph like all the rest.

The exporter puts each into a graph of its own. There no pass would find a BatchNorm or dropout that has to be put into
evaluation, a layer that can be rounded, or state that is written to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_GRADIENTS, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_BODY = {_GRADIENTS: 1, _AUTOCAST: 4}
"""Where among the arguments of a region the graph of it is, with what it is given behind it."""


def inline_regions(module: fx.GraphModule) -> None:
    """Put the operations of such regions into the graph itself; of those without gradients, detached from the others.

    A region that turns autocast on stays, and so does one that holds graphs of other kinds, such as branches.
    """
    for node in list(module.graph.nodes):
        kind = _kind(node)
        if kind is None:
            continue
        place: Any = node.args[_BODY[kind]]
        body = module.get_submodule(place.target)
        assert isinstance(body, fx.GraphModule)
        inline_regions(body)
        if not body.graph.find_nodes(op="get_attr"):
            _inline(module, node, body, detached=kind == _GRADIENTS and not node.args[0])
            if not place.users:
                module.graph.erase_node(place)
    module.delete_all_unused_submodules()
    module.recompile()


def _kind(node: fx.Node) -> str | None:
    """That of a region to be put into the graph; None for another node."""
    name = getattr(node.target, "__name__", "") if isinstance(node.target, torch._ops.HigherOrderOperator) else ""  # noqa: SLF001
    switched_on = name == _AUTOCAST and node.args[2]
    return name if name in _BODY and not switched_on else None


def _inline(module: fx.GraphModule, node: fx.Node, body: fx.GraphModule, *, detached: bool) -> None:
    graph, buffers = module.graph, {name for name, _ in module.named_buffers(remove_duplicate=False)}
    given: Any = node.args[_BODY[str(_kind(node))] + 1 :]
    with graph.inserting_before(node):
        # Buffers have no gradients, and passes know them by their names.
        inside = [_detached(graph, one) if detached and str(one.target) not in buffers else one for one in given]
        places: Any = dict(zip(body.graph.find_nodes(op="placeholder"), inside, strict=True))
        results: Any = graph.graph_copy(body.graph, places)
        outside = [_detached(graph, one) if detached else one for one in results]
    for user in list(node.users):  # each takes one of the results
        user.replace_all_uses_with(outside[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)


def _detached(graph: fx.Graph, value: Any) -> Any:
    """The tensor without its history; anything else as it is."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not (isinstance(found, torch.Tensor) and found.is_floating_point()):
        return value
    made = graph.call_function(torch.ops.aten.detach.default, (value,))
    made.meta = {"val": found}  # of no layer: torchao takes the last operation of a layer for its product
    return made
