"""Max pooling in a captured graph becomes `ops.max_pool` where a device has kernels for it.

This is done in the graph that is captured of the model, before the compiler has made the pool's gradient: what it makes
of it differs from release to release, down to several operations that no longer name a pool (torch 2.13). The op
brings its own backward.

Which pools says `nn.pool_calls`; of those the ones whose gradient is wanted.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from deepseek_mp.nn.pool_calls import Choice, taken_over
from deepseek_mp.ops.max_pool import fastest

_POOLS = (F.max_pool2d, torch.max_pool2d, torch.ops.aten.max_pool2d.default)


def replace_pools(graph: fx.GraphModule, choose: Choice = fastest) -> int:
    """Put our op in the place of the graph's pools, of those named above; how many they were.

    Args:
        graph: as `torch.compile` gives it to a backend, its nodes described by `example_value`.
        choose: the implementation for a pool.
    """
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _POOLS or not _gradient_is_wanted(node):
            continue
        ours = taken_over(node.args, node.kwargs, _value_of, choose)
        if ours is not None:
            _replace(node, ours)
            replaced += 1
    if replaced:
        graph.recompile()
    return replaced


def _gradient_is_wanted(node: fx.Node) -> bool:
    pooled = node.meta.get("example_value")  # a tuple if asked for indices
    return isinstance(pooled, Tensor) and pooled.requires_grad


def _value_of(argument: Any) -> Any:
    return argument.meta.get("example_value") if isinstance(argument, fx.Node) else None


def _replace(node: fx.Node, ours: tuple[Any, ...]) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        both = graph.call_function(torch.ops.deepseek_mp.max_pool2d.default, ours)
        values = graph.call_function(operator.getitem, (both, 0))
    both.meta = {name: value for name, value in node.meta.items() if name != "example_value"}
    values.meta = dict(node.meta)
    node.replace_all_uses_with(values)
    graph.erase_node(node)
