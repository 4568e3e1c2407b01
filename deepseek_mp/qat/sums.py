"""Sums behind layers written so that the compiler's passes for INT8 do not fail at them, or leave a factor out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from deepseek_mp.qat.constants import aliased
from deepseek_mp.qat.layers import PRODUCTS

aten = torch.ops.aten
_PRODUCTS = {aten.add.Tensor: aten.mul.Tensor, aten.add_.Tensor: aten.mul_.Tensor}
_DIFFERENCES = {aten.add.Tensor: aten.sub.Tensor, aten.add_.Tensor: aten.sub_.Tensor}
_ACTIVATIONS = {aten.relu.default, aten.relu_.default, aten.gelu.default}
_DROPOUTS = {aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default}
"""(input, p, train)."""


def double(module: fx.GraphModule, *, inference: bool = False) -> None:
    """Make products with two of sums of a tensor with itself, the same bit for bit: those passes fail at such a sum.

    Args:
        inference: nobody asks for gradients: a detached tensor is itself, as the result of dropout in evaluation is.
    """
    for node in module.graph.nodes:
        if node.target in _PRODUCTS and not node.kwargs:
            left, right = (_itself(arg) if inference else arg for arg in node.args)
            if left is right and _dtype(left) is not torch.bool:  # of which the product is a whole number
                node.target = _PRODUCTS[node.target]
                node.update_arg(1, 2)
    module.recompile()


def double_copies(graph: fx.Graph) -> None:
    """The same in the compiler's own graph, which has one node for a tensor and its copies, as `clone` makes them."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        left, right = node.args
        if left is right and not node.kwargs and _dtype(left) not in (None, torch.bool):
            node.target = aten.mul.Tensor
            node.update_arg(1, 2)


def spell_out(module: fx.GraphModule) -> None:
    """Cast and multiply before a sum what it would itself cast to its dtype, or multiply by its `alpha`.

    Where a layer's result is added, those passes leave the factor out, and have no kernel for tensors of two dtypes.
    """
    for node in module.graph.nodes:
        dtype = _dtype(node)
        if node.target not in _PRODUCTS or dtype is None or not dtype.is_floating_point:
            continue
        with module.graph.inserting_before(node):
            left, right = (_cast(arg, dtype) for arg in node.args)
            if node.kwargs and isinstance(right, fx.Node):
                right = _called(aten.mul.Tensor, right, node.kwargs["alpha"])
                node.kwargs = {}
        node.args = (left, right)
    module.recompile()


def spare_operands(module: fx.GraphModule) -> None:
    """Make y - (-x) of y + x, the same bit for bit, where x lies in memory that must not be written to.

    Kernels of linear layers take what is added to their result for the place to write it to, inputs of the model and
    its weights too, and tensors whose elements share memory. So it is made where x or y is the activation of a layer:
    the passes fail at such a sum.
    """
    for node in module.graph.nodes:
        if node.target not in _DIFFERENCES or node.kwargs or None in map(_dtype, node.args):
            continue
        left, right = node.args
        if node.target is aten.add.Tensor and _is_borrowed(left):
            left, right = right, left
        floating = all(_dtype(arg).is_floating_point for arg in (left, right))  # type: ignore[union-attr]
        borrowed = _is_borrowed(right) and not _is_borrowed(left)
        if floating and (borrowed or _is_activation(left) or _is_activation(right)):
            with module.graph.inserting_before(node):
                negative = module.graph.call_function(aten.neg.default, (right,))
            negative.meta = {"val": right.meta["val"]}
            node.target, node.args = _DIFFERENCES[node.target], (left, negative)
    module.recompile()


def _is_activation(node: fx.Node) -> bool:
    """Whether a layer's kernel computes it as a part of the product."""
    source: Any = _itself(node)
    return source.target in _ACTIVATIONS and source.args[0].target in PRODUCTS


def _is_borrowed(node: fx.Node) -> bool:
    """Whether the tensor is in memory of an input or a constant, or several elements are in the same place of it."""
    left = [node]
    while left:
        one = _itself(left.pop())
        found = one.meta.get("val")
        shared = isinstance(found, torch.Tensor) and any(isinstance(s, int) and s == 0 for s in found.stride())
        if one.op in ("placeholder", "get_attr") or shared:
            return True
        left += aliased(one)
    return False


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    """The tensor in the dtype; numbers as they are."""
    return arg if _dtype(arg) in (None, dtype) else _called(aten.to.dtype, arg, dtype)


def _called(operation: Any, tensor: fx.Node, value: Any) -> fx.Node:
    """Of a tensor of the value's dtype, or of its own where the value is a number."""
    made = tensor.graph.call_function(operation, (tensor, value))
    found = tensor.meta["val"]
    made.meta = {"val": found.to(value) if isinstance(value, torch.dtype) else found}
    return made


def _dtype(node: Any) -> torch.dtype | None:
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found.dtype if isinstance(found, torch.Tensor) else None


def _itself(node: Any) -> Any:
    """The tensor that the node gives under another name."""
    while isinstance(node, fx.Node) and (
        node.target is aten.detach.default or (node.target in _DROPOUTS and not node.args[2])
    ):
        node = node.args[0]
    return node
