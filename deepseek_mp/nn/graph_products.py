"""Products of linear layers of fewer bits in a graph, and which of them read the same values.

The graph need not be functional, so that one node can stand for different values: between products that are said to
read the same, nothing writes in place. What is not known not to write counts as writing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import fx

from deepseek_mp.ops import fp8_linear, int4_linear, weight_only  # noqa: F401 - they define the ops
from deepseek_mp.ops.native.fp8_linear import cast_product, plain, plain_row_cast

ours, aten = torch.ops.deepseek_mp, torch.ops.aten

_BY_ROW = {"q": 0, "scale": 0, "bias": 0}
_PARTS: dict[Any, dict[str, int]] = {
    ours.weight_only_linear.default: _BY_ROW,
    ours.fp8_linear.default: _BY_ROW,
    plain: _BY_ROW,
    ours.int4_linear.default: {"q": 0, "scale": 1, "zero": 1, "bias": 0},
}
"""By product: what belongs to its weight, and the dimension along which the channels are."""
_NAMES: dict[Any, tuple[str, ...]] = {
    ours.weight_only_linear.default: ("x", "q", "scale", "bias", "implementation"),
    ours.fp8_linear.default: ("x", "q", "scale", "bias", "implementation"),
    plain: ("x", "q", "scale", "bias"),
    ours.int4_linear.default: ("x", "q", "scale", "zero", "bias", "implementation"),
}
_SAME_VALUES = ("reshape", "view", torch.reshape, aten.view.default, aten.reshape.default)
"""Of one tensor and sizes these give the same each time."""
_WRITING = frozenset({operator.setitem, operator.delitem, *(getattr(operator, name) for name in (
    "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
    "itruediv", "ixor",
))})  # fmt: skip
_MODES = ("_set_", "_enter_", "_exit_")
"""How the names of functions begin behind which others may compute in another way."""


@dataclass(frozen=True, eq=False)
class Product:
    """A layer's product in a graph, its weight among the graph's inputs."""

    node: fx.Node
    target: Any
    given: dict[str, Any]
    """Its arguments by name."""
    since: int
    """Position in the graph from which on its input has to stay what it is."""
    at: int

    @property
    def parts(self) -> dict[str, int]:
        """What belongs to the weight and is there, with its dimension of channels."""
        return {name: dim for name, dim in _PARTS[self.target].items() if self.given[name] is not None}


def same_input(graph: fx.Graph, *, alike: bool = True) -> Iterator[list[Product]]:
    """Products of one kind that read the same values, in the graph's order; also groups of one.

    Args:
        graph: as `torch.compile` gives it to a backend, or of an exported program.
        alike: those of a group have a bias all or none of them.
    """
    inputs = set(graph.find_nodes(op="placeholder"))
    position = {node: at for at, node in enumerate(graph.nodes)}
    writes = [at for node, at in position.items() if _may_write(node)]
    waiting: dict[Any, list[Product]] = {}
    for node in graph.nodes:
        product = _product(node, inputs, position)
        if product is None:
            continue
        others = tuple(value for name, value in product.given.items() if name not in (*_PARTS[product.target], "x"))
        key = (_values(product.given["x"]), product.target, others, alike and tuple(product.parts))
        group = waiting.setdefault(key, [])
        since = min([product.since, *(one.since for one in group)])
        if group and any(since < at < product.at for at in writes):
            yield waiting.pop(key)
        waiting.setdefault(key, []).append(product)
    yield from waiting.values()


def _product(node: fx.Node, inputs: set[fx.Node], position: dict[fx.Node, int]) -> Product | None:
    """None: another node, or a product whose weight is not an input of the graph."""
    target = getattr(node.target, "default", node.target)
    if node.op != "call_function" or target not in _PARTS:
        return None
    names = _NAMES[target]
    given = {**dict.fromkeys(names), **dict(zip(names, node.args, strict=False)), **node.kwargs}
    if set(given) != set(names) or not isinstance(given["x"], fx.Node):
        return None
    at = position[node]
    product = Product(node, target, given, min((position[one] for one in _reshapes(given["x"])), default=at), at)
    known = all(given[name] in inputs for name in product.parts)
    return product if known and ("zero" not in names or given["zero"] is not None) else None


def _reshapes(x: fx.Node) -> Iterator[fx.Node]:
    while x.target in _SAME_VALUES and isinstance(x.args[0], fx.Node):
        yield x
        x = x.args[0]


def _values(x: fx.Node) -> Any:
    """Equal for nodes that have the same values, as far as nothing writes."""
    if x.target not in _SAME_VALUES or not isinstance(x.args[0], fx.Node):
        return x
    return (x.target, _values(x.args[0]), repr(x.args[1:]), repr(x.kwargs))


def _may_write(node: fx.Node) -> bool:
    """Whether the node may change a tensor that is there before it."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    target: Any = node.target
    if node.op == "call_method":
        return target.endswith("_") and (not target.endswith("__") or target[2] == "i" or target == "__setitem__")
    if node.op != "call_function":
        return True
    if isinstance(target, torch._ops.OpOverloadPacket):  # noqa: SLF001 - it has no public name
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())  # noqa: SLF001
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return bool(target._schema.is_mutable)  # noqa: SLF001
    return not _is_plain(target) or any(argument is True for argument in node.args)  # the place of F.relu's `inplace`


def _is_plain(function: Any) -> bool:
    """Whether it is a function of PyTorch or of Python that makes new tensors or views."""
    if function in (plain, plain_row_cast, cast_product):
        return True
    if not isinstance(function, (FunctionType, BuiltinFunctionType, MethodDescriptorType)):
        return False
    module = getattr(function, "__module__", None) or "torch"
    return module.partition(".")[0] in ("torch", "_operator", "operator", "math", "builtins") and not (
        function in _WRITING or function.__name__.endswith("_") or function.__name__.startswith(_MODES)
    )
