"""A graph that was exported in training mode, as other modes run it: BatchNorm, dropout and the like in evaluation.

An exported graph has its mode written into the arguments of its operations. torchao's own switch replaces
whole operations by patterns with the default `eps` and momentum; here only the arguments that say the mode
are changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import fx

aten = torch.ops.aten
MOMENTUM = 6
"""Its place among the arguments of a BatchNorm."""
OTHER_MODES = {"train": False, "training": False, "dropout_p": 0.0}
"""Arguments of operations other than BatchNorm that say the mode (dropout, attention, LSTM, RReLU), in evaluation."""

Forward = Callable[..., Any]
Part = TypeVar("Part")


@contextmanager
def on_its_own() -> Iterator[None]:
    """Inside, tensors are made that can be trained, in FP32, whatever regions the caller has open.

    Whatever is drawn there on the CPU, as torchao does for its patterns, the caller's random numbers go on as without.
    """
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        yield


def norms_of(graph: fx.Graph) -> list[fx.Node]:
    """BatchNorms with running statistics: (input, weight, bias, mean, variance, training, momentum, eps, cudnn)."""
    nodes = graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    return [node for node in nodes if node.args[3] is not None]


def evaluate_norms(graph: fx.Graph) -> None:
    """Let BatchNorms use their running statistics, and leave those and their counters alone."""
    for node in norms_of(graph):
        node.update_arg(5, False)
        share = node.args[MOMENTUM]
        if isinstance(share, fx.Node):  # which reads the counter
            node.update_arg(MOMENTUM, 0.0)
            graph.erase_node(share)
    for node in graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        counter = node.args[0]
        if isinstance(counter, fx.Node) and str(counter.target).endswith("num_batches_tracked") and not node.users:
            graph.erase_node(node)


def evaluate_others(graph: fx.Graph) -> None:
    """Let dropout, and whatever else has a mode of its own, do as in evaluation."""
    for node in graph.nodes:
        if not hasattr(node.target, "_schema") or node.target is aten.batch_norm.default:
            continue
        if node.target is aten.instance_norm.default and node.args[3] is not None:
            node.update_arg(5, False)  # whether it computes its statistics: without running ones it always does
        for index, argument in enumerate(node.target._schema.arguments):  # noqa: SLF001 - it has no public name
            if argument.name not in OTHER_MODES:
                continue
            if index < len(node.args):
                node.update_arg(index, OTHER_MODES[argument.name])
            elif argument.name in node.kwargs:
                node.update_kwarg(argument.name, OTHER_MODES[argument.name])


def quiet_copy(part: Part) -> Part:
    """A copy of a graph or a part of it, without what PyTorch says of its own containers while they are copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return deepcopy(part)


def change_all(module: fx.GraphModule, graph: fx.Graph, *changes: Callable[[fx.Graph], None]) -> None:
    """Change a graph over the module's tensors, and copies of the graphs of regions in it, such as under autocast."""
    for change in changes:
        change(graph)
    for place in graph.find_nodes(op="get_attr"):
        body = attrgetter(str(place.target))(module)
        if isinstance(body, fx.GraphModule):
            copy = fx.GraphModule(body, quiet_copy(body.graph))
            change_all(copy, copy.graph, *changes)
            copy.recompile()
            place.target = "_".join((str(place.target), *(change.__name__ for change in changes)))
            module.add_submodule(str(place.target), copy)


def forward_with(module: fx.GraphModule, *changes: Callable[[fx.Graph], None]) -> Forward:
    """The forward of a changed copy of the module's graph, a function of the module itself: it holds no tensor."""
    graph = quiet_copy(module.graph)
    change_all(module, graph, *changes)
    forward: Forward = type(fx.GraphModule(module, graph)).forward
    return forward
