"""Linear layers of fewer bits in a captured graph that read the same input become one product.

A product of one row takes the time of its weight's bytes and that of a launch; two weights in one launch save the other
one, and more channels keep more of a GPU busy. The weights have to lie beside each other in memory, as
`inference.beside` lays them, so that the joined one is a view: nothing is copied, and what is loaded into a layer is
loaded into it. Layers whose weights do not lie like that stay apart.

Outputs of the joined product are parts of its rows. For one row a part is contiguous as it is. For several, the graph
asks for that, which the compiler makes a part of what reads it; a copy is left only before what it does not compile.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from deepseek_mp.nn.graph_products import Product, same_input
from deepseek_mp.ops.adjacent import together

_SOURCE = "_dynamo_source"
"""An attribute that the compiler asks every input of a graph for; None where it is none of the traced code's."""


class _Joined:
    """An input of the rewritten graph: several of its inputs as one tensor."""

    def __init__(self, places: tuple[int, ...], dim: int) -> None:
        self._places, self._dim = places, dim
        self._pointers: list[int] = []
        self._whole: Tensor | None = None
        self._first: ref[Tensor] | None = None

    def of(self, inputs: Sequence[Any]) -> Tensor:
        """A view, as long as they lie beside each other; otherwise a copy that is made at every call."""
        parts = [inputs[place] for place in self._places]
        pointers = [part.data_ptr() for part in parts]
        if self._whole is None or pointers != self._pointers:
            self._whole, self._pointers = together(parts, self._dim), pointers
            self._first = ref(parts[0], self._forget)
        return torch.cat([part.detach() for part in parts], self._dim) if self._whole is None else self._whole

    def _forget(self, _first: ref[Tensor]) -> None:
        """The memory is not kept once the weight is gone."""
        self._whole = None


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
        """A function of this graph's inputs as one of the former graph's; it keeps none of those of now."""
        joined = self.joined

        def call(*given: Any) -> Any:
            return run(*given, *[one.of(given) for one in joined])

        return call


def join_products(given: fx.GraphModule, inputs: Sequence[Any]) -> JoinedGraph | None:
    """A copy of the graph with products joined; None if there is nothing to join.

    Args:
        given: as `torch.compile` gives it to a backend, its nodes described by `example_value`; it stays as it is.
        inputs: those of the graph, the weights among them. Without values they lie nowhere, and nothing is joined.
    """
    if any(isinstance(one, FakeTensor) for one in inputs) or not any(_found(given.graph, inputs)):
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
    made = fx.GraphModule(given, copy.deepcopy(given.graph))
    made.meta = dict(given.meta)
    vars(made).update({name: value for name, value in vars(given).items() if name not in vars(made)})
    for old, new in zip(given.graph.nodes, made.graph.nodes, strict=True):
        if hasattr(old, _SOURCE):
            setattr(new, _SOURCE, getattr(old, _SOURCE))
    return made


def _places(graph: fx.Graph) -> dict[fx.Node, int]:
    """The graph's inputs, numbered."""
    return {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}


def _found(graph: fx.Graph, inputs: Sequence[Any]) -> Iterator[list[Product]]:
    """Products that can be joined, each group as its weights lie."""
    places = _places(graph)
    for group in same_input(graph):
        yield from _runs(group, places, inputs)


def _runs(group: list[Product], places: dict[fx.Node, int], inputs: Sequence[Any]) -> Iterator[list[Product]]:
    """The longest parts of a group, of two products or more, whose weights lie beside each other, in that order."""

    def adjacent(left: Product, right: Product) -> bool:
        pairs = ([inputs[places[one.given[name]]] for one in (left, right)] for name in left.parts)
        return all(together(pair, dim) is not None for pair, dim in zip(pairs, left.parts.values(), strict=True))

    once = {product.given["q"]: product for product in reversed(group)}  # a layer that is called again stays apart
    ordered = sorted(once.values(), key=lambda product: inputs[places[product.given["q"]]].data_ptr())
    cuts = [at for at, pair in enumerate(pairwise(ordered), 1) if not adjacent(*pair)]
    for start, end in pairwise([0, *cuts, len(ordered)]):
        if end - start > 1:
            yield ordered[start:end]


def _replace(run: list[Product], places: dict[fx.Node, int], added: dict[tuple[tuple[int, ...], int], fx.Node]) -> None:
    """One product in the place of several; `added` are the graph's inputs for joined weights."""
    first = min(run, key=lambda product: product.at)
    graph, value = first.node.graph, first.node.meta["example_value"]
    whole = dict(first.given)
    for name, dim in first.parts.items():
        key = tuple(places[product.given[name]] for product in run), dim
        if key not in added:
            added[key] = _input(graph, [*places, *added.values()][-1], f"joined_{name}_{len(added)}")
        whole[name] = added[key]
    ends = list(accumulate(product.node.meta["example_value"].shape[1] for product in run))
    with graph.inserting_before(first.node):
        joined = graph.call_function(first.target, tuple(whole.values()))
        joined.meta = {**first.node.meta, "example_value": value.new_empty((value.shape[0], ends[-1]))}
        for product, start, end in zip(run, [0, *ends], ends, strict=False):
            part = graph.call_function(operator.getitem, (joined, (slice(None), slice(start, end))))
            part.meta = {**product.node.meta, "example_value": joined.meta["example_value"][:, start:end]}
            own = graph.call_method("contiguous", (part,))
            own.meta = dict(product.node.meta)
            product.node.replace_all_uses_with(own)
    for product in run:
        graph.erase_node(product.node)


def _input(graph: fx.Graph, last: fx.Node, name: str) -> fx.Node:
    with graph.inserting_after(last):
        made = graph.placeholder(name)
    setattr(made, _SOURCE, None)
    return made
