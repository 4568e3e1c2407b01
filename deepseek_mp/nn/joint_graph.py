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
  gradient of its weight: the same kernel makes that too, so that it is not kept between forward and backward.

**Recognising an activation.** A graph holds it taken apart into elementary operations, differently in every version
of PyTorch. So what stands before a cast is not compared with patterns: it is evaluated in FP64 on random numbers,
and is an activation if its values are. That is safe since what is looked at is analytic, but for relu's bend at zero.
Roundings in between are left out, there as in the cast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_or

from deepseek_mp.ops import schema_made, sources

aten, prims, ours = torch.ops.aten, torch.ops.prims, torch.ops.deepseek_mp

_MOST_OPERATIONS = 40
"""Operations in front of a cast that are looked at; an activation's gradient has less than twenty."""
_VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default,  # noqa: SLF001
    aten.slice.Tensor,
})  # fmt: skip
_WIDE = (torch.bfloat16, torch.float32, torch.float64)
"""Types between which a conversion is no more than a rounding; to others it changes or cuts values."""
_SMOOTH = frozenset({
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.exp.default, aten.sigmoid.default,
    aten.tanh.default, aten.erf.default, aten.pow.Tensor_Scalar, aten.reciprocal.default,
})  # fmt: skip
"""Analytic functions: two compositions of them that agree on a stretch agree everywhere."""
_POINTWISE = _SMOOTH | {
    aten.relu.default, aten.where.self, aten.le.Scalar, aten.full.default, aten.scalar_tensor.default,
}  # fmt: skip
"""With what relu and its gradient are made of: a bend at zero of a tensor that is read, and nowhere else."""
_FUSED_ANYWAY = _POINTWISE | {aten.sum.dim_IntList, aten.sum.default}
"""Readers that the compiler computes together with what they read, so that it need not be stored for them."""


class FuseProducers(CustomGraphPass):
    """The pass, for Inductor's `joint_custom_pre_pass`."""

    def __call__(self, graph: fx.Graph) -> None:
        _share(graph)
        made = [found for cast in casts_of(graph) if (found := _recognised(cast)) is not None]
        for pair in _pairs(made):
            value = _value_of(pair, made)
            _replace_pair(*pair, value)
            made = [one for one in made if one not in (*pair, value)]
            if value is not None:
                _replace(_without_columns(value))
        for one in made:
            _replace(one)
        _narrow(graph)

    def uuid(self) -> Any:
        """What the compiler's cache knows the pass by."""
        return get_hash_for_files((__file__, str(sources.__file__), str(schema_made.__file__)))


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
class _Made:
    """A cast whose tensor is computed of `inputs` as `source` says."""

    cast: CastNode
    source: str
    inputs: tuple[fx.Node, ...]


_QUANTISE_NAMES = ("x", "format", "granularity", "power_of_two", "rows", "columns", "implementation")


def casts_of(graph: fx.Graph) -> list[CastNode]:
    """The casts of tensors that are stored."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is ours.quantise.default:
            values = dict(zip(_QUANTISE_NAMES, node.args, strict=False)) | node.kwargs
            x = values.pop("x")
            found.append(CastNode(node, node.target, x, tuple(sorted(values.items()))))
        elif node.target is auto_functionalized_v2 and node.args[0] is ours.quantise_delayed.default:
            values = dict(node.kwargs)
            x = values.pop("x")
            for name in ("top", "_all_bases", "_amax_base_index"):
                del values[name]
            found.append(CastNode(node, node.args[0], x, tuple(sorted(values.items()))))
    return found


def _share(graph: fx.Graph) -> None:
    """Let casts of one tensor in one way be one."""
    first: dict[Any, CastNode] = {}
    for cast in casts_of(graph):
        key = _origin(cast.x), str(cast.x.meta["val"].shape), cast.op, cast.settings  # sizes may be symbols
        original = first.setdefault(key, cast)
        if original is cast:
            continue
        kept = original.results  # anew each time: it may have got one
        for number, result in cast.results.items():
            if number >= _RESULTS:
                _leave_unchanged(graph, result, cast)
            elif number in kept:
                result.replace_all_uses_with(kept[number])
                graph.erase_node(result)
            else:  # moved to the one that stays
                result.update_arg(0, original.node)
                original.node.append(result)
        graph.erase_node(cast.node)


_RESULTS = 4
"""Results of a cast; what follows are the tensors that it changed."""


def _leave_unchanged(graph: fx.Graph, changed: fx.Node, cast: CastNode) -> None:
    """The largest magnitude that a cast noted stays what it was: the cast is gone."""
    assert cast.scaling is not None
    amax = cast.scaling[1]
    for user in list(changed.users):
        if user.target is aten.copy_.default and user.args == (amax, changed):
            graph.erase_node(user)
    changed.replace_all_uses_with(amax)
    graph.erase_node(changed)


def _origin(node: fx.Node) -> fx.Node:
    """The tensor that a node is a view of, of all of it in its order."""
    while node.op == "call_function" and node.target in _VIEWS and _keeps_all(node):
        node = _seen_by(node)
    return node


def _value(node: fx.Node) -> fx.Node:
    """The same through roundings too."""
    while _is_transparent(node):
        node = _seen_by(node)
    return node


def _is_transparent(node: fx.Node) -> bool:
    """Whether a node has the values of its argument, all of them, as far as rounding goes."""
    if node.op != "call_function":
        return False
    if node.target is prims.convert_element_type.default:
        return node.args[1] in _WIDE and _seen_by(node).meta["val"].dtype in _WIDE
    return (node.target in _VIEWS or node.target is aten.clone.default) and _keeps_all(node)


def _seen_by(node: fx.Node) -> fx.Node:
    """The tensor that a view or a conversion is of."""
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _keeps_all(node: fx.Node) -> bool:
    return statically_known_true(node.meta["val"].numel() == _seen_by(node).meta["val"].numel())


# -- recognising -----------------------------------------------------------------------------------


def _recognised(cast: CastNode) -> _Made | None:
    settings = dict(cast.settings)
    if not sources.can_make("delayed" if cast.scaling else settings["granularity"], settings["implementation"]):
        return None
    if not _read_by_casts_only(cast.x):
        return None
    between = _Between(cast.x)
    leaves = between.leaves()
    if leaves is None or not all(_can_be_read(leaf, cast.x) for leaf in leaves):
        return None
    for source, order in _candidates(len(leaves)):
        if between.computes(source, [leaves[i] for i in order]):
            return _Made(cast, source, tuple(leaves[i] for i in order))
    return None


def _candidates(count: int) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (name, order)
        for name, source in sources.SOURCES.items()
        if source.inputs == count
        for order in permutations(range(count))
    ]


def _read_by_casts_only(x: fx.Node) -> bool:
    """Or by what is computed elementwise: else the tensor is stored anyway, and the cast had better read that."""
    return _only_casts_below(_value(x))


def _only_casts_below(node: fx.Node) -> bool:
    return all(
        _is_cast(user) or user.target in _FUSED_ANYWAY or (_is_transparent(user) and _only_casts_below(user))
        for user in node.users
    )


def _is_cast(node: fx.Node) -> bool:
    return node.target is ours.quantise.default or (
        node.target is auto_functionalized_v2 and node.args[0] is ours.quantise_delayed.default
    )


def _can_be_read(leaf: fx.Node, x: fx.Node) -> bool:
    """Whether the leaf lies in memory as the kernel reads it."""
    of, value = leaf.meta.get("val"), x.meta["val"]
    return (
        isinstance(of, Tensor)
        and all(isinstance(size, int) for size in (*of.shape, *value.shape))  # not for sizes that change
        and of.numel() == value.numel()
        and of.shape[-1] == value.shape[-1]
        and of.dtype == torch.bfloat16
        and of.is_contiguous()
    )


class _Between:
    """The elementwise operations between a tensor and what it is computed of."""

    def __init__(self, x: fx.Node) -> None:
        self._x = x

    def leaves(self) -> list[fx.Node] | None:
        """What it is computed of, at most three tensors; None if it is too much."""
        found: dict[fx.Node, None] = {}
        waiting, seen = [self._x], {self._x}
        while waiting:
            node = waiting.pop()
            if self._is_between(node):
                new = [n for n in node.all_input_nodes if n not in seen]
                seen.update(new)
                waiting += new
            else:
                found[node] = None
            if len(seen) > _MOST_OPERATIONS:
                return None
        count = len(found)
        return list(found) if 0 < count <= max(source.inputs for source in sources.SOURCES.values()) else None

    def _is_between(self, node: fx.Node) -> bool:
        if _is_transparent(node):
            return True
        if node.op != "call_function" or node.target not in _POINTWISE:
            return False
        if node.target in (aten.full.default, aten.scalar_tensor.default):
            return bool(node.args[-1] == 0)
        if node.target in (aten.relu.default, aten.le.Scalar) and not _bends_at_zero(node):
            return False
        counts = [n.meta["val"].numel() if _is_tensor(n) else None for n in node.all_input_nodes]
        whole = node.meta["val"].numel()
        return all(n is not None and statically_known_true(sym_or(n == 1, n == whole)) for n in counts)

    def computes(self, source: str, leaves: Sequence[fx.Node]) -> bool:
        """Whether its values are those of the source."""
        with unset_fake_temporarily():  # the compiler computes with shapes only
            given = _numbers(len(leaves))
            try:
                found = self._evaluate(self._x, dict(zip(leaves, given, strict=True)))
            except (TypeError, RuntimeError):  # an operation with arguments that a plain vector does not fit
                return False
            expected = sources.compute(source, given)
            return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=1e-9, atol=1e-9))

    def _evaluate(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node in known:
            return known[node]
        if _is_transparent(node):
            known[node] = self._evaluate(_seen_by(node), known)
        elif node.target in (aten.full.default, aten.scalar_tensor.default):
            known[node] = torch.zeros((), dtype=torch.float64)
        else:
            arguments = fx.node.map_arg(node.args, lambda n: self._evaluate(n, known))
            run: Callable[..., Any] = node.target  # type: ignore[assignment]
            known[node] = run(*arguments, **node.kwargs)
        return known[node]


def _is_tensor(node: fx.Node) -> bool:
    """Sizes that are not known are nodes too."""
    return isinstance(node.meta.get("val"), Tensor)


def _bends_at_zero(node: fx.Node) -> bool:
    """Whether relu, or a comparison with zero, is of a tensor that is read, or the comparison of relu's result."""
    of = _value(_seen_by(node))
    if node.target is aten.le.Scalar:
        if node.args[1] != 0:
            return False
        if of.target is aten.relu.default:
            of = _value(_seen_by(of))
    return of.target not in _POINTWISE


def _numbers(count: int) -> list[Tensor]:
    """Vectors of numbers to compare two functions of `count` arguments on: any, and each combination of some."""
    generator = torch.Generator().manual_seed(0)
    some = torch.tensor([-60.0, -8.0, -1.0, -1e-3, 0.0, 1e-3, 0.5, 3.0, 20.0, 60.0], dtype=torch.float64)
    grid = torch.cartesian_prod(*[some] * count).view(-1, count).unbind(1)
    return [torch.cat([torch.randn(64, dtype=torch.float64, generator=generator) * 2, part]) for part in grid]


# -- replacing -------------------------------------------------------------------------------------


def _pairs(made: Sequence[_Made]) -> list[tuple[_Made, _Made]]:
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


def _can_be_one(one: _Made, other: _Made) -> bool:
    """Whether all that both read is there where the first of the two stands.

    It is not where the second raises a magnitude that the first has raised: a layer that is called twice.
    """
    earlier = min(one.cast.node, other.cast.node)
    read = [node for cast in (one.cast, other.cast) for node in cast.node.all_input_nodes if node is not cast.x]
    return all(node < earlier for node in (*one.inputs, *read))


def _value_of(pair: tuple[_Made, _Made], made: Sequence[_Made]) -> _Made | None:
    """The cast of the gated activation itself, if its transposed half can be made where its gradients are."""
    of_x, of_up = pair
    for one in made:
        same = one.source == of_up.source and one.inputs == of_x.inputs[:2] and one.cast.op is of_x.cast.op
        if same and _scaled_alike(one, of_x) and {0, 2, 3} <= one.cast.results.keys():
            return one if _can_wait(one, min(of_x.cast.node, of_up.cast.node)) else None
    return None


def _scaled_alike(one: _Made, other: _Made) -> bool:
    """In all but the format and the layouts."""
    names = {name for name, _ in one.cast.settings} - {"format", "rows", "columns"}
    ours, theirs = dict(one.cast.settings), dict(other.cast.settings)
    return all(ours[name] == theirs[name] for name in names) and bool(ours["rows"] and ours["columns"])


def _can_wait(value: _Made, node: fx.Node) -> bool:
    """Whether nothing that leads to the node reads the transposed half of the value."""
    return not any(reader in _leading_to(node) for reader in _readers(value))


def _readers(value: _Made) -> list[fx.Node]:
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


def _without_columns(value: _Made) -> _Made:
    """The value's cast as it is after its transposed half is made elsewhere."""
    settings = tuple((name, False if name == "columns" else setting) for name, setting in value.cast.settings)
    cast = value.cast
    q, scale, qt, qt_scale, *changed = cast.node.meta["val"]
    cast.node.meta["val"] = (q, scale, qt.new_empty(0), qt_scale.new_empty(0), *changed)
    return replace(value, cast=replace(cast, settings=settings))


def _replace(made: _Made) -> None:
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


def _replace_pair(one: _Made, other: _Made, value: _Made | None) -> None:
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
            changed = [made.cast.node.meta["val"][_RESULTS] for made in (one, other)]
    values = [made.cast.node.meta["val"][:_RESULTS] for made in (one, other)]
    nothing = values[0][1].new_empty(0)
    again = (nothing, nothing) if value is None else value.cast.node.meta["val"][2:_RESULTS]
    _describe(node, earlier, (*values[0], *values[1], *again, *changed))
    if value is not None:
        _move_behind(node, _readers(value))
        for number in (2, 3):
            _take_over(value.cast.results[number], node, 2 * _RESULTS + number - 2)
    for position, made in enumerate((one, other)):
        for number, result in made.cast.results.items():
            changes = number == _RESULTS
            _take_over(result, node, 2 * _RESULTS + 2 + position if changes else position * _RESULTS + number)
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
        if value.dtype != torch.float32 or _origin(cast.x).target not in _POINTWISE or not _read_by_casts_only(cast.x):
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
