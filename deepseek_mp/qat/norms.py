"""BatchNorms behind convolutions: the rounding of weights scaled by them in training, their folding in conversion.

torchao's patterns for training scale a convolution's weights by gamma / sqrt(variance + eps) before they are rounded
(Krishnamoorthi, "Quantizing deep convolutional networks", 2018, section 3.2), and undo that before the BatchNorm. Here
they get the mode, momentum and `eps` of the model, in place of those in torchao's patterns, and are folded exactly.
Undoing it would divide by zero for a channel whose gamma is zero: such weights are scaled as if it were one.

A BatchNorm without momentum averages over all batches, by a count that the exporter cannot read: it is exported with a
momentum, and reads the count again after that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.batchnorm import _BatchNorm

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.qat.modes import MOMENTUM, norms_of

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)

OFF = 1e-4
"""Below it a gamma does not scale weights: its weights would be rounded to zero, and it would have no gradient."""

MEAN, COUNT = "running_mean", "num_batches_tracked"

Settings = tuple[Any, ...]


def norm_settings(graph: fx.Graph) -> dict[Any, Settings]:
    """Training, momentum and eps of each BatchNorm, by the name of its mean."""
    return {_name(norm.args[3]): norm.args[5:8] for norm in norms_of(graph)}


def give_momentum(model: nn.Module) -> set[str]:
    """Give BatchNorms without momentum one; returns the names that their means have in a graph."""
    found = {}
    for name, norm in model.named_modules(remove_duplicate=False):
        if isinstance(norm, _BatchNorm) and norm.momentum is None and norm.num_batches_tracked is not None:
            found[f"{name}.{MEAN}".removeprefix(".")] = norm
    for norm in found.values():
        norm.momentum = 0.0  # in the graph it is replaced
    return set(found)


def average_by_count(prepared: fx.GraphModule, means: Collection[str]) -> None:
    """Let the BatchNorms with these means take each batch as one of all so far; `ConfigError` for those in regions."""
    graph, counts = prepared.graph, dict[str, fx.Node]()
    for node in graph.find_nodes(op="get_attr"):
        if _name(node) in means and any(isinstance(user.target, HigherOrderOperator) for user in node.users):
            passed = f"{_name(node).rpartition('.')[0]!r} with momentum=None, called under autocast or the like"
            raise ConfigError(explain(passed, "a BatchNorm with a momentum there", "Set its momentum, such as to 0.1"))
    training = {norm for norm in norms_of(graph) if norm.args[5]}  # others count nothing
    for node in list(graph.nodes):
        if node.target is aten.add_.Tensor and isinstance(node.args[0], fx.Node):
            counts[_name(node.args[0])] = node
        elif node in training and (mean := _name(node.args[3])) in means:
            with graph.inserting_before(node):
                share = graph.call_function(share_of_one, (counts[mean.replace(MEAN, COUNT)],))
            node.update_arg(MOMENTUM, share)
    prepared.recompile()


def share_of_one(count: Tensor) -> float:
    """Of a batch, the last of so many."""
    return 1 / float(count)


def complete_norms(module: fx.GraphModule) -> None:
    """Give BatchNorms without weight or bias ones and zeros in place of it: torchao's patterns compute with both."""
    graph = module.graph
    for count, norm in enumerate(norms_of(graph)):
        for index, name, fill in ((1, "weight", torch.ones_like), (2, "bias", torch.zeros_like)):
            if norm.args[index] is None:
                mean: Any = norm.args[3]
                module.register_buffer(f"_norm_{count}_{name}", fill(attrgetter(_name(mean))(module)))
                with graph.inserting_before(norm):
                    made = graph.get_attr(f"_norm_{count}_{name}")
                made.meta = {"val": mean.meta["val"]}
                norm.update_arg(index, made)
    module.recompile()


@contextmanager
def without_statistics_hidden(graph: fx.Graph) -> Iterator[None]:
    """Inside, BatchNorms without running statistics are not known as such: no weights can be scaled by theirs."""
    nodes = [node for node in graph.find_nodes(op="call_function", target=aten.batch_norm.default) if not node.args[3]]
    for node in nodes:
        node.target = aten.native_batch_norm.default
    try:
        yield
    finally:
        for node in nodes:
            node.target = aten.batch_norm.default


def put_back_settings(prepared: fx.GraphModule, own: Mapping[Any, Settings]) -> None:
    """Give the BatchNorms of a prepared graph the settings that they had before."""
    for norm in norms_of(prepared.graph):
        for index, value in enumerate(own[_name(norm.args[3])], start=5):
            norm.update_arg(index, value)
        summed = _scaling(norm)
        if summed is not None:
            summed.update_arg(1, norm.args[7])
            _scale_by_others(prepared.graph, _ratio(summed))
    prepared.recompile()


def _scale_by_others(graph: fx.Graph, ratio: fx.Node) -> None:
    """Let weights be scaled by one in place of a gamma that is `OFF`; it is still what the BatchNorm multiplies by."""
    gamma: Any = ratio.args[0]
    with graph.inserting_before(ratio):
        size = graph.call_function(aten.abs.default, (gamma,))
        off = graph.call_function(aten.lt.Scalar, (size, OFF))
        ratio.update_arg(0, graph.call_function(aten.masked_fill.Scalar, (gamma, off, 1.0)))


def fold_norms(module: fx.GraphModule) -> None:
    """In a prepared graph, in evaluation, let the convolutions whose weights are scaled do the whole BatchNorm.

    Others become a product and a sum: where torchao sees a BatchNorm it looks for its patterns, for half a minute.
    """
    for norm in norms_of(module.graph):
        if not (_scaling(norm) is not None and _fold(module.graph, norm)):
            _spell_out(module.graph, norm)
    module.graph.eliminate_dead_code()
    module.recompile()


def _fold(graph: fx.Graph, norm: fx.Node) -> bool:
    """conv(x, w * s) + (bias - mean) * s + beta, with s = gamma / sqrt(variance + eps), is all of it."""
    result: Any = norm.args[0]
    unscaled, bias = (result.args[0], result.args[1].args[0]) if result.target is aten.add.Tensor else (result, None)
    product, scale = unscaled.args[0], unscaled.args[1].args[0]
    if product.target not in CONVOLUTIONS:
        return False
    gamma, beta, mean = norm.args[1:4]
    scale.update_arg(0, gamma)  # the weights of channels that are off are zero now
    with graph.inserting_before(product):
        centred = graph.call_function(aten.neg.default, (mean,)) if bias is None else _sub(graph, bias, mean)
        shift = graph.call_function(aten.mul.Tensor, (centred, scale))
        total = graph.call_function(aten.add.Tensor, (shift, beta))
    product.args = (*product.args[:2], total, *product.args[3:])
    norm.replace_all_uses_with(product)
    return True


def _spell_out(graph: fx.Graph, norm: fx.Node) -> None:
    """x * s + (beta - mean * s) by channel, the second dimension."""
    x, gamma, beta, mean, variance = norm.args[:5]
    shape = [1, -1] + [1] * (norm.meta["val"].dim() - 2)
    with graph.inserting_before(norm):

        def call(operation: Any, *args: Any) -> fx.Node:
            return graph.call_function(operation, args)

        scale = call(aten.rsqrt.default, call(aten.add.Tensor, variance, norm.args[7]))
        scale = scale if gamma is None else call(aten.mul.Tensor, scale, gamma)
        shift = call(aten.neg.default, call(aten.mul.Tensor, mean, scale))
        shift = shift if beta is None else call(aten.add.Tensor, shift, beta)
        scaled = call(aten.mul.Tensor, x, call(aten.reshape.default, scale, shape))
        result = call(aten.add.Tensor, scaled, call(aten.reshape.default, shift, shape))
    norm.replace_all_uses_with(result)


def _sub(graph: fx.Graph, left: fx.Node, right: Any) -> fx.Node:
    return graph.call_function(aten.sub.Tensor, (left, right))


def _scaling(norm: fx.Node) -> fx.Node | None:
    """Where `eps` is added to the variance to scale the weights; None for a BatchNorm that scales none."""
    variance: Any = norm.args[4]
    return next((user for user in variance.users if user.target is aten.add.Tensor), None)


def _ratio(summed: fx.Node) -> fx.Node:
    """Gamma / sqrt(variance + eps), by which weights are scaled."""
    root = next(iter(summed.users))
    return next(iter(root.users))


def _name(node: Any) -> str:
    return str(node.target)
