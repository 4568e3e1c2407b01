"""Attention of few queries in a captured graph becomes `ops.few_query_attention`, as `nn.attention_calls` chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from deepseek_mp.nn.attention_calls import ATTENTION, Choice, taken_over
from deepseek_mp.ops.few_query_attention import fastest


def replace_attention(graph: fx.GraphModule, choose: Choice = fastest) -> int:
    """Put our op in the place of the graph's attention of few queries, also in graphs inside it; how many they were.

    Args:
        graph: as `torch.compile` gives it to a backend, its nodes described by `example_value`.
        choose: the implementation for a call.
    """
    replaced = 0
    for part in graph.modules():
        if isinstance(part, fx.GraphModule):
            replaced += _replace(part, choose)
    return replaced


def _replace(graph: fx.GraphModule, choose: Choice) -> int:
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in ATTENTION or _wants_gradient(node):
            continue
        ours = taken_over(node.args, node.kwargs, _value, choose)
        if ours is None:
            continue
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(torch.ops.deepseek_mp.few_query_attention.default, ours)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
        replaced += 1
    if replaced:
        graph.recompile()
    return replaced


def _value(argument: Any) -> Any:
    """The tensor, without values, that a node of the graph stands for."""
    return argument.meta.get("example_value") if isinstance(argument, fx.Node) else argument


def _wants_gradient(node: fx.Node) -> bool:
    out = node.meta.get("example_value")
    return not isinstance(out, Tensor) or out.requires_grad
