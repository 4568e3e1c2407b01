"""Linear layers of fewer bits in a captured graph that read the same input become one product.

A product of one row takes the time of its weight's bytes and that of a launch; two weights in one launch save the other
one, and more channels keep more of a GPU busy. The weights have to lie beside each other in memory, as
`inference.beside` lays them, so that the joined one is a view: nothing is copied, and what is loaded into a layer is
loaded into it. Layers whose weights do not lie like that stay apart.

Outputs of the joined product are parts of its rows. For one row a part is contiguous as it is. For several, the graph
asks for that, which the compiler makes a part of what reads it; a copy is left only before what it does not compile.

The graph is not functional: between the products of a group nothing may write in place. What is not known not to write
ends a group.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from deepseek_mp.ops import fp8_linear, int4_linear, weight_only  # noqa: F401 - they define the ops
from deepseek_mp.ops.adjacent import together
from deepseek_mp.ops.native.fp8_linear import plain

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
_SOURCE = "_dynamo_source"
"""An attribute that the compiler asks every input of a graph for; None where it is none of the traced code's."""
_MODES = ("_set_", "_enter_", "_exit_")
"""How the names of functions begin behind which others may compute in another way."""


@dataclass(frozen=True, eq=False)
class _Product:
    """A layer's product in the graph."""

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


class _Joined:
    """An input of the rewritten graph: several of its inputs as one tensor."""

    def __init__(self, places: tuple[int, ...], dim: int) -> None:
        self._places, self._dim = places, dim
        self._pointers: list[int] = []
        self._whole: Tensor | None = None

    def of(self, inputs: Sequence[Any]) -> Tensor:
        """A view, as long as they lie beside each other; otherwise a copy that is made at every call."""
        parts = [inputs[place] for place in self._places]
        pointers = [part.data_ptr() for part in parts]
        if self._whole is None or pointers != self._pointers:
            self._whole, self._pointers = together(parts, self._dim), pointers
        return torch.cat([part.detach() for part in parts], self._dim) if self._whole is None else self._whole


@dataclass(frozen=True, eq=False)
class JoinedGraph:
    """A graph in which products were joined."""

    graph: fx.GraphModule
    inputs: list[Any]
    """Of this graph: those of the former one, then joined weights."""
    joined: tuple[_Joined, ...]
    groups: tuple[tuple[Tensor, ...], ...]
    """Of each joined product the weights `q` of its layers, as they lie in memory."""

    def taking_former(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A function of this graph's inputs as one of the former graph's."""

        def call(*given: Any) -> Any:
            return run(*given, *[one.of(given) for one in self.joined])

        return call


def join_products(given: fx.GraphModule, inputs: Sequence[Any]) -> JoinedGraph | None:
    """A copy of the graph with products joined; None if there is nothing to join.

    Args:
        given: as `torch.compile` gives it to a backend, its nodes described by `example_value`; it stays as it is.
        inputs: those of the graph, the weights among them.
    """
    if not any(_found(given.graph, inputs)):
        return None
    graph = _copied(given)
    places = _places(graph.graph)
    added: dict[tuple[tuple[int, ...], int], fx.Node] = {}
    groups = []
    for run in list(_found(graph.graph, inputs)):
        _replace(run, places, added)
        groups.append(tuple(inputs[places[product.given["q"]]] for product in run))
    graph.recompile()
    joined = tuple(_Joined(*key) for key in added)
    return JoinedGraph(graph, [*inputs, *[_without_values(one.of(inputs)) for one in joined]], joined, tuple(groups))


def _without_values(tensor: Tensor) -> Tensor:
    """As the compiler describes it to itself, with sizes that do not change."""
    mode = detect_fake_mode()
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def _copied(given: fx.GraphModule) -> fx.GraphModule:
    """With a graph of its own, since PyTorch looks at the inputs of the one that it gave when that is compiled."""
    made = copy.copy(given)
    made.graph = copy.deepcopy(given.graph)
    vars(made).update({name: value for name, value in vars(given).items() if name not in vars(made)})
    for old, new in zip(given.graph.nodes, made.graph.nodes, strict=True):
        if hasattr(old, _SOURCE):
            setattr(new, _SOURCE, getattr(old, _SOURCE))
    return made


def _places(graph: fx.Graph) -> dict[fx.Node, int]:
    """The graph's inputs, numbered."""
    return {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}


def _found(graph: fx.Graph, inputs: Sequence[Any]) -> Iterator[list[_Product]]:
    """Products that can be joined, each group as its weights lie."""
    places = _places(graph)
    for group in _groups(graph, places):
        yield from _runs(group, places, inputs)


def _groups(graph: fx.Graph, places: dict[fx.Node, int]) -> Iterator[list[_Product]]:
    """Products of one kind that read the same values."""
    position = {node: at for at, node in enumerate(graph.nodes)}
    writes = [at for node, at in position.items() if _may_write(node)]
    waiting: dict[Any, list[_Product]] = {}
    for node in graph.nodes:
        product = _product(node, places, position)
        if product is None:
            continue
        others = tuple(value for name, value in product.given.items() if name not in (*_PARTS[product.target], "x"))
        key = (_values(product.given["x"]), product.target, others, tuple(product.parts))
        group = waiting.setdefault(key, [])
        since = min([product.since, *(one.since for one in group)])
        if any(since < at < product.at for at in writes):
            yield waiting.pop(key)
            group = waiting.setdefault(key, [])
        group.append(product)
    yield from waiting.values()


def _product(node: fx.Node, places: dict[fx.Node, int], position: dict[fx.Node, int]) -> _Product | None:
    """None: another node, or a product whose weight is not an input of the graph."""
    target = getattr(node.target, "default", node.target)
    if node.op != "call_function" or target not in _PARTS or not isinstance(node.meta.get("example_value"), Tensor):
        return None
    names = _NAMES[target]
    given = {**dict.fromkeys(names), **dict(zip(names, node.args, strict=False)), **node.kwargs}
    if set(given) != set(names) or not isinstance(given["x"], fx.Node):
        return None
    at = position[node]
    product = _Product(node, target, given, min((position[one] for one in _reshapes(given["x"])), default=at), at)
    known = all(given[name] in places for name in product.parts)
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
    if function is plain:
        return True
    if not isinstance(function, (FunctionType, BuiltinFunctionType, type(torch.Tensor.add))):
        return False
    module = getattr(function, "__module__", None) or "torch"
    return module.partition(".")[0] in ("torch", "_operator", "operator", "math", "builtins") and not (
        function in _WRITING or function.__name__.endswith("_") or function.__name__.startswith(_MODES)
    )


def _runs(
    group: list[_Product], places: dict[fx.Node, int], inputs: Sequence[Any]
) -> Iterator[list[_Product]]:  # fmt: skip
    """The longest parts of a group, of two products or more, whose weights lie beside each other, in that order."""
    if len(group) < 2:
        return
    ordered = sorted(group, key=lambda product: inputs[places[product.given["q"]]].data_ptr())
    run = ordered[:1]
    for left, right in pairwise(ordered):
        if not all(
            together([inputs[places[one.given[name]]] for one in (left, right)], dim) is not None
            for name, dim in left.parts.items()
        ):
            if len(run) > 1:
                yield run
            run = []
        run.append(right)
    if len(run) > 1:
        yield run


def _replace(
    run: list[_Product], places: dict[fx.Node, int], added: dict[tuple[tuple[int, ...], int], fx.Node]
) -> None:
    first = min(run, key=lambda product: product.at)
    graph, value = first.node.graph, first.node.meta["example_value"]
    whole = dict(first.given)
    for name, dim in first.parts.items():
        key = tuple(places[product.given[name]] for product in run), dim
        if key not in added:
            added[key] = _input(graph, [*places, *added.values()][-1], f"joined_{name}_{len(added)}")
        whole[name] = added[key]
    channels = [product.node.meta["example_value"].shape[1] for product in run]
    with graph.inserting_before(first.node):
        product = graph.call_function(first.target, tuple(whole.values()))
        product.meta = {**first.node.meta, "example_value": value.new_empty((value.shape[0], sum(channels)))}
        start = 0
        made = []
        for one, count in zip(run, channels, strict=True):
            part = graph.call_function(operator.getitem, (product, (slice(None), slice(start, start + count))))
            part.meta = {**one.node.meta, "example_value": product.meta["example_value"][:, start : start + count]}
            own = graph.call_method("contiguous", (part,))
            own.meta = dict(one.node.meta)
            made.append(own)
            start += count
    for one, own in zip(run, made, strict=True):
        one.node.replace_all_uses_with(own)
        graph.erase_node(one.node)


def _input(graph: fx.Graph, last: fx.Node, name: str) -> fx.Node:
    with graph.inserting_after(last):
        made = graph.placeholder(name)
    setattr(made, _SOURCE, None)
    return made
