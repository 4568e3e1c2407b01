"""Which layers of a model compute in INT8, read off its prepared graph, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from deepseek_mp.precision import Decision, Reason
from deepseek_mp.qat.constants import varying

aten = torch.ops.aten
VARYING = "its weight is computed in every call, from inputs, written state or random numbers"
APART = "it is called where the forward turns autocast on, and such a region stays as it is"
PRODUCTS = {aten.linear.default, aten.conv1d.default, aten.conv2d.default}
"""Operations (input, weight, ...) that INT8 kernels are there for."""
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_NORMS = (nn.modules.batchnorm._BatchNorm,)  # noqa: SLF001 - the class of them all
_CALLED_ONCE = {aten.conv1d.default, aten.conv2d.default, aten.batch_norm.default}
OTHERS = (
    nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.Embedding,
    nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip
"""Layers with products, or tables, of their own that stay in FP32."""


def layer_of(node: fx.Node) -> str:
    """The name of the innermost module of the original model that the operation is of."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [name for name, _ in stack.values()]
    return str(path[-1]).partition("@")[0] if path else ""  # a second call of a module is "name@1"


def is_kept(name: str, keep: Collection[str]) -> bool:
    """Whether the module of that name is one of those named, or in one."""
    return any(name == kept or name.startswith(f"{kept}.") for kept in keep)


def are_plain(model: nn.Module, graph: fx.Graph) -> bool:
    """Whether each convolution and BatchNorm is called once, and no layer has a hook that may change its result."""
    calls = Counter(layer_of(node) for node in graph.nodes if node.target in _CALLED_ONCE)
    named = dict(model.named_modules())
    layers = [module for module in named.values() if isinstance(module, KINDS + _NORMS)]
    again = (name for name, count in calls.items() if count > 1 and isinstance(named.get(name), KINDS + _NORMS))
    return not list(again) and not any(layer._forward_hooks for layer in layers)  # noqa: SLF001 - nothing public says so


def with_varying_weights(graph: fx.Graph) -> set[fx.Node]:
    """Products whose weight is computed in every call: INT8 kernels take constants only."""
    found = varying(graph)
    return {node for node in graph.nodes if node.target in PRODUCTS and node.args[1] in found}


def is_quantised(node: fx.Node, module: nn.Module) -> bool:
    """Whether a product's input and weight both come out of fake quantisation."""
    return all(isinstance(arg, fx.Node) and _is_quantiser(arg, module) for arg in node.args[:2])


def layer_decisions(model: nn.Module, prepared: fx.GraphModule, keep: Collection[str]) -> tuple[Decision, ...]:
    """A decision for each layer of the original model with weights of a product, in the model's order."""
    products: dict[str, list[fx.Node]] = {}
    for node in prepared.graph.nodes:
        if node.target in PRODUCTS:
            products.setdefault(layer_of(node), []).append(node)
    decisions, varying, apart = [], with_varying_weights(prepared.graph), _in_graphs_of_their_own(prepared)
    for name, layer in model.named_modules():
        if isinstance(layer, KINDS + OTHERS):
            own = products.get(name, [])
            if is_kept(name, keep):
                reason, detail = Reason.PINNED, "named in keep"
            elif not varying.isdisjoint(own):
                reason, detail = Reason.NO_KERNEL, VARYING
            elif name in apart:
                reason, detail = Reason.NO_KERNEL, APART
            else:
                reason, detail = _why(layer, own, prepared)
            new = "int8" if reason is Reason.REQUESTED else "fp32"
            decisions.append(Decision(layer=name, old="fp32", new=new, reason=reason, detail=detail))
    return tuple(decisions)


def _in_graphs_of_their_own(prepared: fx.GraphModule) -> set[str]:
    """Layers with a product in a region that is no part of the graph itself. Branches do not say whose theirs are."""
    inner = (part for part in prepared.modules() if isinstance(part, fx.GraphModule) and part is not prepared)
    return {layer_of(node) for part in inner for node in part.graph.nodes if node.target in PRODUCTS}


def _why(layer: nn.Module, products: list[fx.Node], prepared: fx.GraphModule) -> tuple[Reason, str]:
    if not isinstance(layer, KINDS):
        return Reason.NO_KERNEL, f"{type(layer).__name__} has no INT8 kernel here"
    if not products:
        return (
            Reason.NOT_CONTROLLABLE,
            "its own forward was not called in the exported graph, or in a branch of it alone",
        )
    if not all(is_quantised(node, prepared) for node in products):
        return Reason.NO_KERNEL, "its input or its weight is not quantised in the exported graph"
    return Reason.REQUESTED, ""


def _is_quantiser(node: fx.Node, module: nn.Module) -> bool:
    if node.op != "call_module":
        return False
    called: Any = module.get_submodule(str(node.target))
    return hasattr(called, "activation_post_process")
