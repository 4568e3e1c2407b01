"""A graph that was exported in training mode, as other modes run it: BatchNorm and dropout as in evaluation.

An exported graph has its mode written into the arguments of its operations. torchao's own switch replaces
whole operations by patterns with the default `eps` and momentum; here only the arguments that say the mode
are changed.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
DROPOUTS = {
    dropout.default
    for dropout in (
        aten.dropout, aten.dropout_, aten.feature_dropout, aten.feature_dropout_, aten.alpha_dropout,
        aten.alpha_dropout_, aten.feature_alpha_dropout, aten.feature_alpha_dropout_,
    )
}  # fmt: skip
"""Operations (input, p, train)."""

Forward = Callable[..., Any]


def norms_of(graph: fx.Graph) -> list[fx.Node]:
    """BatchNorms with running statistics: (input, weight, bias, mean, variance, training, momentum, eps, cudnn)."""
    nodes = graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    return [node for node in nodes if node.args[3] is not None]


def evaluate_norms(graph: fx.Graph) -> None:
    """Let BatchNorms use their running statistics, and leave those and their counters alone."""
    for node in norms_of(graph):
        node.update_arg(5, False)
    for node in graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        counter = node.args[0]
        if isinstance(counter, fx.Node) and str(counter.target).endswith("num_batches_tracked") and not node.users:
            graph.erase_node(node)


def evaluate_dropout(graph: fx.Graph) -> None:
    """Let dropout pass everything."""
    for node in graph.nodes:
        if node.target in DROPOUTS:
            node.update_arg(2, False)


def forward_with(module: fx.GraphModule, *changes: Callable[[fx.Graph], None]) -> Forward:
    """The forward of a changed copy of the module's graph, a function of the module itself: it holds no tensor."""
    graph = deepcopy(module.graph)
    for change in changes:
        change(graph)
    forward: Forward = type(fx.GraphModule(module, graph)).forward
    return forward
