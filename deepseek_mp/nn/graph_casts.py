"""The casts in a graph of operations, and what their tensors are views and roundings of."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten, prims, ours = torch.ops.aten, torch.ops.prims, torch.ops.deepseek_mp

RESULTS = 4
"""Results of a cast; what follows are the tensors that it changed."""


_VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default,  # noqa: SLF001
    aten.slice.Tensor,
})  # fmt: skip
_WIDE = (torch.bfloat16, torch.float32, torch.float64)
"""Types between which a conversion is no more than a rounding; to others it changes or cuts values."""


@dataclass(frozen=True, eq=False)
class CastNode:
    """A call of `quantise` or `quantise_delayed` in the graph."""

    node: fx.Node
    op: Any
    x: fx.Node
    settings: tuple[tuple[str, Any], ...]
    """Its arguments but for tensors."""

    @property
    def scaling(self) -> tuple[fx.Node, fx.Node] | None:
        """`top` and `amax`, if it is delayed; `amax` may be what a cast before it left of the same tensor."""
        if self.node.target is not auto_functionalized_v2:
            return None
        values: Mapping[str, Any] = self.node.kwargs
        (amax,) = values["_all_bases"]
        return values["top"], amax

    @property
    def results(self) -> dict[int, fx.Node]:
        """Its results that are used, by number."""
        return {user.args[1]: user for user in self.node.users if user.target is operator.getitem}  # type: ignore[misc]


@dataclass(frozen=True, eq=False)
class MadeCast:
    """A cast whose tensor is computed of `inputs` as `source` says."""

    cast: CastNode
    source: str
    inputs: tuple[fx.Node, ...]


_QUANTISE_NAMES = ("x", "format", "granularity", "power_of_two", "rows", "columns", "implementation")


def casts_of(graph: fx.Graph) -> list[CastNode]:
    """The casts of tensors that are stored, but for those that round stochastically."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is ours.quantise.default and not _is_stochastic(node):
            values = dict(zip(_QUANTISE_NAMES, node.args, strict=False)) | node.kwargs
            x = values.pop("x")
            values.pop("seed", None)
            found.append(CastNode(node, node.target, x, tuple(sorted(values.items()))))
        elif node.target is auto_functionalized_v2 and node.args[0] is ours.quantise_delayed.default:
            values = dict(node.kwargs)
            x = values.pop("x")
            for name in ("top", "_all_bases", "_amax_base_index"):
                del values[name]
            found.append(CastNode(node, node.args[0], x, tuple(sorted(values.items()))))
    return found


def is_cast(node: fx.Node) -> bool:
    """Whether a node is a cast of a tensor that is stored."""
    if node.target is ours.quantise.default:
        return not _is_stochastic(node)
    return node.target is auto_functionalized_v2 and node.args[0] is ours.quantise_delayed.default


def _is_stochastic(node: fx.Node) -> bool:
    """Whether a call of `quantise` has a seed."""
    return node.kwargs.get("seed") is not None


def origin(node: fx.Node) -> fx.Node:
    """The tensor that a node is a view of, of all of it in its order."""
    while node.op == "call_function" and node.target in _VIEWS and _keeps_all(node):
        node = seen_by(node)
    return node


def unrounded(node: fx.Node) -> fx.Node:
    """The same through roundings too."""
    while is_transparent(node):
        node = seen_by(node)
    return node


def is_transparent(node: fx.Node) -> bool:
    """Whether a node has the values of its argument, all of them, as far as rounding goes."""
    if node.op != "call_function":
        return False
    if node.target is prims.convert_element_type.default:
        return node.args[1] in _WIDE and seen_by(node).meta["val"].dtype in _WIDE
    return (node.target in _VIEWS or node.target is aten.clone.default) and _keeps_all(node)


def seen_by(node: fx.Node) -> fx.Node:
    """The tensor that a view or a conversion is of."""
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _keeps_all(node: fx.Node) -> bool:
    return statically_known_true(node.meta["val"].numel() == seen_by(node).meta["val"].numel())
