"""What is rounded, how and where: torchao's quantizer for x86 with our observers and more layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    QUANT_ANNOTATION_KEY,
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from deepseek_mp.qat.layers import PRODUCTS, is_kept, layer_of, with_varying_weights
from deepseek_mp.qat.modes import norms_of
from deepseek_mp.qat.observers import FiniteFakeQuantize, FiniteRange, FiniteRangePerChannel

LEAST_SCALE = torch.finfo(torch.float32).eps
"""torchao's 2**-12 would leave a channel whose weights are below 0.03 with less than 8 bits."""
SHARE = 0.01
"""Of a batch in the moving averages of an activation's range: torchao's."""

SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
RELUS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)

ONE_RANGE = {
    torch.ops.aten.cat.default,
    torch.ops.aten.avg_pool2d.default,
    torch.ops.aten.adaptive_avg_pool2d.default,
}
"""Operations of whose inputs and output torchao makes one range, an average of theirs that begins with the first input.

A larger part of what is joined is clipped to it, and averages are smaller than what they are of.
"""


class Quantizer(X86InductorQuantizer):  # type: ignore[misc]
    """Also marks what torchao passes over: Conv1d, and layers of classes derived from those that it looks for.

    What a BatchNorm gives, or its sum with a shortcut, is not rounded for itself, before the activation behind it:
    kernels round after all of them. Nor are elementwise products, which are no layer's.

    Products stay as they are whose weight is computed in every call.

    Args:
        keep: names of modules that stay as they are.
        alone: each product is marked by itself. torchao looks for layers and what is behind them as one, and fails
            where a layer's result is no product, as with a hook on it, or where a convolution is called again.
    """

    def __init__(self, keep: Collection[str], *, alone: bool = False) -> None:
        super().__init__()
        self.keep, self.alone = keep, alone
        for name in keep:
            self.set_module_name_qconfig(name, None)
        self.set_global(configuration())

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        marked = self._annotated(model)
        for node in (*norms_of(marked.graph), *sums_before_activations(marked.graph)):
            if QUANT_ANNOTATION_KEY in node.meta:
                node.meta[QUANT_ANNOTATION_KEY].output_qspec = None
        varying = with_varying_weights(marked.graph)
        for node in marked.graph.nodes:
            if node.target not in PRODUCTS:
                continue
            # What is to stay torchao marks as empty, and fails at that before a BatchNorm.
            if node in varying or is_kept(layer_of(node), self.keep):
                node.meta.pop(QUANT_ANNOTATION_KEY, None)
                continue
            if QUANT_ANNOTATION_KEY not in node.meta:
                self._mark(node, self.global_config)
        return marked

    def _annotated(self, model: fx.GraphModule) -> fx.GraphModule:
        marked: fx.GraphModule
        try:
            marked = super().annotate(model)
        except (AssertionError, TypeError, ValueError):
            # Of torchao, about what is behind a layer: the sum with a number, say, or what a hook for gradients leaves.
            for node in model.graph.nodes:
                node.meta.pop(QUANT_ANNOTATION_KEY, None)
            self.alone = True
            marked = super().annotate(model)
        return marked

    def _mark(self, node: fx.Node, config: Any) -> None:
        linear = node.target is torch.ops.aten.linear.default
        mark = self._annotate_linear_node_helper if linear else self._annotate_conv_node_helper
        mark(node, True, config)

    def _annotate_conv2d_fusion_pattern(self, model: fx.GraphModule, config: Any, filter_fn: Any = None) -> None:
        """Also linear layers, where each product is marked by itself."""
        if not self.alone:
            super()._annotate_conv2d_fusion_pattern(model, config, filter_fn)
            return
        for node in model.graph.nodes if config is not None else ():
            if node.target in PRODUCTS and not is_kept(layer_of(node), self.keep):
                self._mark(node, config)

    def _annotate_linear_fusion_pattern(self, model: fx.GraphModule, config: Any, filter_fn: Any = None) -> None:
        if not self.alone:
            super()._annotate_linear_fusion_pattern(model, config, filter_fn)

    def _annotate_propagation_quantizable_pattern(self, node: fx.Node, *args: Any) -> None:
        """What is joined or averaged is rounded where it is read: see `ONE_RANGE`."""
        if node.target not in ONE_RANGE:
            super()._annotate_propagation_quantizable_pattern(node, *args)

    def _annotate_mul_tensor(self, *args: Any) -> None:
        """Elementwise products stay as they are."""


def sums_before_activations(graph: fx.Graph) -> list[fx.Node]:
    """Sums of two tensors that only a ReLU reads."""
    sums = (node for target in SUMS for node in graph.find_nodes(op="call_function", target=target))
    return [node for node in sums if node.users and all(user.target in RELUS for user in node.users)]


def configuration() -> Any:
    """Activations by tensor, 0...255 with a zero point; weights by output channel, -128...127, symmetric.

    Weights have the range of the moment: an average of earlier ones would lag behind the optimizer.
    """
    moving = FiniteFakeQuantize.with_args(observer=FiniteRange, eps=LEAST_SCALE, averaging_constant=SHARE)
    current = FiniteFakeQuantize.with_args(observer=FiniteRangePerChannel, eps=LEAST_SCALE, averaging_constant=1.0)
    config: Any = get_default_x86_inductor_quantization_config(is_qat=True)
    activation = replace(config.input_activation, observer_or_fake_quant_ctr=moving)
    weight = replace(config.weight, observer_or_fake_quant_ctr=current)
    return replace(config, input_activation=activation, output_activation=activation, weight=weight)
