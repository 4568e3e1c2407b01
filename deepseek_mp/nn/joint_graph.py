"""What compiled code gains from seeing a model's forward and backward as one graph of operations.

The casts to FP8 are opaque to the compiler. In the graph that it makes of forward and backward, before it
parts the two, this pass finds what surrounds them:

- **One cast for equal ones.** Layers that read one tensor (query, key and value; gate and up) quantise it once.
  Under delayed scaling the first layer's scale counts, which holds the same tensor.
- **Half the bytes between a norm and the cast.** What is computed in FP32 just before a cast, and read by casts
  only, is rounded to BF16 there, as it would be in front of a BF16 layer.
- **Activations inside the cast.** `down(silu(gate(x)) * up(x))` quantises a tensor that nobody else reads. The cast
  reads what it is computed of instead, and it is never stored; its gradients to gate and up are quantised by one
  kernel that reads their three arguments once. `down` needs the product a second time, transposed, for the
  gradient of its weight: the same kernel makes that too, so that it is not kept between forward and backward. All
  that for one gate and one product of it, as models have them; where either has more readers, casts stay apart.

`nn.graph_activations` says how an activation is recognised.

**Stochastic casts** are left alone, and so is what they read: each has a random seed of its own, and a rounding to BF16
in front would spoil the mean that they keep.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from deepseek_mp.nn import graph_activations, graph_casts
from deepseek_mp.nn.graph_activations import POINTWISE, read_by_casts_only, recognised
from deepseek_mp.nn.graph_casts import RESULTS, CastNode, MadeCast, casts_of, origin
from deepseek_mp.ops import schema_made, sources

aten, prims, ours = torch.ops.aten, torch.ops.prims, torch.ops.deepseek_mp


class FuseProducers(CustomGraphPass):
    """The pass, for Inductor's `joint_custom_pre_pass`.

    Each fusion is a method, so that a subclass with a `uuid` of its own can leave one out and measure what it buys.
    """

    def __call__(self, graph: fx.Graph) -> None:
        self.share(graph)
        made = self.recognise(graph)
        for pair in self.pair(made):
            value = self.make_again(pair, made)
            _replace_pair(*pair, value)
            made = [one for one in made if one not in (*pair, value)]
            if value is not None:
                _replace(_without_columns(value))
        for one in made:
            _replace(one)
        self.narrow(graph)

    def share(self, graph: fx.Graph) -> None:
        """One cast for equal ones."""
        _share(graph)

    def recognise(self, graph: fx.Graph) -> list[MadeCast]:
        """The casts that will compute their tensor: an activation, or the gradient of one."""
        return [found for cast in casts_of(graph) if (found := recognised(cast)) is not None]

    def pair(self, made: Sequence[MadeCast]) -> list[tuple[MadeCast, MadeCast]]:
        """Those of them that are both gradients of one gate, and become one call."""
        return _pairs(made)

    def make_again(self, pair: tuple[MadeCast, MadeCast], made: Sequence[MadeCast]) -> MadeCast | None:
        """The cast of the gated activation itself whose transposed half is made with these gradients."""
        return _value_of(pair, made)

    def narrow(self, graph: fx.Graph) -> None:
        """Half the bytes between a norm and the cast."""
        _narrow(graph)

    def uuid(self) -> Any:
        """What the compiler's cache knows the pass by."""
        modules = (graph_activations, graph_casts, schema_made, sources)
        return get_hash_for_files((__file__, *(str(module.__file__) for module in modules)))


def _share(graph: fx.Graph) -> None:
    """Let casts of one tensor in one way be one."""
    first: dict[Any, CastNode] = {}
    for cast in casts_of(graph):
        key = origin(cast.x), str(cast.x.meta["val"].shape), cast.op, cast.settings  # sizes may be symbols
        original = first.setdefault(key, cast)
        if original is cast:
            continue
        kept = original.results  # anew each time: it may have got one
        for number, result in cast.results.items():
            if number >= RESULTS:
                _leave_unchanged(graph, result, cast)
            elif number in kept:
                result.replace_all_uses_with(kept[number])
                graph.erase_node(result)
            else:  # moved to the one that stays
                result.update_arg(0, original.node)
                original.node.append(result)
        graph.erase_node(cast.node)


def _leave_unchanged(graph: fx.Graph, changed: fx.Node, cast: CastNode) -> None:
    """The largest magnitude that a cast noted stays what it was: the cast is gone."""
    assert cast.scaling is not None
    amax = cast.scaling[1]
    for user in list(changed.users):
        if user.target is aten.copy_.default and user.args == (amax, changed):
            graph.erase_node(user)
    changed.replace_all_uses_with(amax)
    graph.erase_node(changed)


def _pairs(made: Sequence[MadeCast]) -> list[tuple[MadeCast, MadeCast]]:
    """Both gradients of a gated activation, quantised alike: that to its argument first."""
    pairs = []
    for one in made:
        activation, gated, _ = one.source.partition("_gate_grad")
        if not gated:
            continue
        x, _up, g = one.inputs
        for other in made:
            alike = other.cast.settings == one.cast.settings and other.cast.op is one.cast.op
            same = alike and other.source == f"{activation}_gate" and other.inputs == (x, g)
            if same and _can_be_one(one, other):
                pairs.append((one, other))
                break
    return pairs


def _can_be_one(one: MadeCast, other: MadeCast) -> bool:
    """Whether all that both read is there where the first of the two stands.

    It is not where the second raises a magnitude that the first has raised: a layer that is called twice.
    """
    earlier = min(one.cast.node, other.cast.node)
    read = [node for cast in (one.cast, other.cast) for node in cast.node.all_input_nodes if node is not cast.x]
    return all(node < earlier for node in (*one.inputs, *read))


def _value_of(pair: tuple[MadeCast, MadeCast], made: Sequence[MadeCast]) -> MadeCast | None:
    """The cast of the gated activation itself, if its transposed half can be made where its gradients are."""
    of_x, of_up = pair
    for one in made:
        same = one.source == of_up.source and one.inputs == of_x.inputs[:2] and one.cast.op is of_x.cast.op
        if same and _scaled_alike(one, of_x) and {0, 2, 3} <= one.cast.results.keys():
            return one if _can_wait(one, min(of_x.cast.node, of_up.cast.node)) else None
    return None


def _scaled_alike(one: MadeCast, other: MadeCast) -> bool:
    """In all but the format and the layouts."""
    names = {name for name, _ in one.cast.settings} - {"format", "rows", "columns"}
    ours, theirs = dict(one.cast.settings), dict(other.cast.settings)
    return all(ours[name] == theirs[name] for name in names) and bool(ours["rows"] and ours["columns"])


def _can_wait(value: MadeCast, node: fx.Node) -> bool:
    """Whether nothing that leads to the node reads the transposed half of the value."""
    return _leading_to(node).isdisjoint(_readers(value))


def _readers(value: MadeCast) -> list[fx.Node]:
    """All that is computed of the transposed half, in the order of the graph."""
    results = value.cast.results
    found: set[fx.Node] = set()
    waiting = [user for number in (2, 3) for user in results[number].users]
    while waiting:
        node = waiting.pop()
        if node not in found and node.op != "output":
            found.add(node)
            waiting += node.users
    return sorted(found)


def _leading_to(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in found]
        found.update(new)
        waiting += new
    return found


def _without_columns(value: MadeCast) -> MadeCast:
    """The value's cast as it is after its transposed half is made elsewhere."""
    settings = tuple((name, False if name == "columns" else setting) for name, setting in value.cast.settings)
    cast = value.cast
    q, scale, qt, qt_scale, *changed = cast.node.meta["val"]
    cast.node.meta["val"] = (q, scale, qt.new_empty(0), qt_scale.new_empty(0), *changed)
    return replace(value, cast=replace(cast, settings=settings))


def _replace(made: MadeCast) -> None:
    cast, settings = made.cast, dict(made.cast.settings)
    graph = cast.node.graph
    with graph.inserting_before(cast.node):
        inputs = [_rows(graph, node, cast.x) for node in made.inputs]
        if cast.scaling is None:
            node = _call(graph, ours.quantise_made.default, {"inputs": inputs, "source": made.source, **settings})
        else:
            top, amax = cast.scaling
            arguments = {"inputs": inputs, "source": made.source, "top": top, **settings}
            node = _changing(graph, ours.quantise_made_delayed.default, arguments, {"amax": amax})
    _describe(node, cast.node, cast.node.meta["val"])
    cast.node.replace_all_uses_with(node)
    graph.erase_node(cast.node)


def _replace_pair(one: MadeCast, other: MadeCast, value: MadeCast | None) -> None:
    """One call where the first of the two was; with a value its transposed half too, and what reads it after it."""
    graph, settings = one.cast.node.graph, dict(one.cast.settings)
    earlier = min(one.cast.node, other.cast.node)
    if value is not None:
        settings["value_format"] = dict(value.cast.settings)["format"]
        if value.cast.scaling is not None:
            settings["value_top"] = value.cast.scaling[0]
    with graph.inserting_before(earlier):
        x, up, g = (_rows(graph, node, one.cast.x) for node in one.inputs)
        arguments = {"x": x, "up": up, "g": g, "activation": one.source.removesuffix("_gate_grad"), **settings}
        if one.cast.scaling is None or other.cast.scaling is None:
            node = _call(graph, ours.quantise_gate_grads.default, arguments)
            changed: Sequence[Any] = ()
        else:
            tops = {"x_top": one.cast.scaling[0], "up_top": other.cast.scaling[0]}
            bases = {"x_amax": one.cast.scaling[1], "up_amax": other.cast.scaling[1]}
            node = _changing(graph, ours.quantise_gate_grads_delayed.default, {**arguments, **tops}, bases)
            changed = [made.cast.node.meta["val"][RESULTS] for made in (one, other)]
    values = [made.cast.node.meta["val"][:RESULTS] for made in (one, other)]
    nothing = values[0][1].new_empty(0)
    again = (nothing, nothing) if value is None else value.cast.node.meta["val"][2:RESULTS]
    _describe(node, earlier, (*values[0], *values[1], *again, *changed))
    if value is not None:
        _move_behind(node, _readers(value))
        for number in (2, 3):
            _take_over(value.cast.results[number], node, 2 * RESULTS + number - 2)
    for position, made in enumerate((one, other)):
        for number, result in made.cast.results.items():
            changes = number == RESULTS
            _take_over(result, node, 2 * RESULTS + 2 + position if changes else position * RESULTS + number)
        graph.erase_node(made.cast.node)


def _move_behind(node: fx.Node, readers: Sequence[fx.Node]) -> None:
    """Those that stand before the node are moved behind it, in their order."""
    last = node
    for reader in readers:
        if reader < node:
            last.append(reader)
            last = reader


def _take_over(result: fx.Node, node: fx.Node, number: int) -> None:
    """What read a result reads the numbered one of the node instead."""
    graph = node.graph
    with graph.inserting_after(node):
        new = graph.call_function(operator.getitem, (node, number))
    new.meta = dict(result.meta)
    result.replace_all_uses_with(new)
    graph.erase_node(result)


def _call(graph: fx.Graph, op: Any, arguments: Mapping[str, Any]) -> fx.Node:
    """A call with the arguments in the order of the op's schema, those with a default by name."""
    schema = op._schema.arguments  # noqa: SLF001
    named = {a.name: arguments[a.name] for a in schema if a.kwarg_only and a.name in arguments}
    return graph.call_function(op, tuple(arguments[a.name] for a in schema if not a.kwarg_only), named)


def _describe(node: fx.Node, replaced: fx.Node, value: Any) -> None:
    """What the compiler wants to know of a node: its results, where it comes from, how its inputs lie in memory."""
    inputs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    node.meta = {**replaced.meta, "val": value, "eager_input_vals": inputs}


def _changing(graph: fx.Graph, op: Any, arguments: Mapping[str, Any], changed: Mapping[str, fx.Node]) -> fx.Node:
    """A call of an op that changes tensors, as the graph holds such calls: the changed ones are results."""
    places = {f"_{name}_base_index": place for place, name in enumerate(changed)}
    return graph.call_function(
        auto_functionalized_v2, (op,), {**arguments, **places, "_all_bases": list(changed.values())}
    )


def _narrow(graph: fx.Graph) -> None:
    """Store in BF16 what is computed in FP32 for casts alone. What is there already, a weight say, is read as it is."""
    for cast in casts_of(graph):
        value = cast.x.meta["val"]
        if value.dtype != torch.float32 or origin(cast.x).target not in POINTWISE or not read_by_casts_only(cast.x):
            continue
        with graph.inserting_before(cast.node):
            narrow = graph.call_function(prims.convert_element_type.default, (cast.x, torch.bfloat16))
        narrow.meta = {**cast.x.meta, "val": value.to(torch.bfloat16)}
        cast.node.replace_input_with(cast.x, narrow)


def _rows(graph: fx.Graph, leaf: fx.Node, x: fx.Node) -> fx.Node:
    """The leaf in the shape of the tensor that is quantised."""
    value, shape = leaf.meta["val"], x.meta["val"].shape
    if value.shape == shape:
        return leaf
    node = graph.call_function(aten.view.default, (leaf, list(shape)))
    node.meta = {**x.meta, "val": value.view(shape)}
    return node
