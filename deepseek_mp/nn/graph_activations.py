"""Which casts quantise an activation, or the gradient of one.

A graph holds an activation taken apart into elementary operations, differently in every version of PyTorch. So what
stands before a cast is not compared with patterns: it is evaluated in FP64 on random numbers, and is an activation if
its values are. That is safe since what is looked at is analytic, but for relu's bend at zero. Roundings in between
are left out, there as in the cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_or

from deepseek_mp.nn.graph_casts import CastNode, MadeCast, is_cast, is_transparent, seen_by, unrounded
from deepseek_mp.ops import sources

aten = torch.ops.aten

_MOST_OPERATIONS = 40
"""Operations in front of a cast that are looked at; an activation's gradient has less than twenty."""
_SMOOTH = frozenset({
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.exp.default, aten.sigmoid.default,
    aten.tanh.default, aten.erf.default, aten.pow.Tensor_Scalar, aten.reciprocal.default,
})  # fmt: skip
"""Analytic functions: two compositions of them that agree on a stretch agree everywhere."""
POINTWISE = _SMOOTH | {
    aten.relu.default, aten.where.self, aten.le.Scalar, aten.full.default, aten.scalar_tensor.default,
}  # fmt: skip
"""With what relu and its gradient are made of: a bend at zero of a tensor that is read, and nowhere else."""
_FUSED_ANYWAY = POINTWISE | {aten.sum.dim_IntList, aten.sum.default}
"""Readers that the compiler computes together with what they read, so that it need not be stored for them."""


def recognised(cast: CastNode) -> MadeCast | None:
    """The cast as one that computes its tensor, if that is an activation and nobody else reads it."""
    settings = dict(cast.settings)
    if not sources.can_make("delayed" if cast.scaling else settings["granularity"], settings["implementation"]):
        return None
    if not read_by_casts_only(cast.x):
        return None
    between = _Between(cast.x)
    leaves = between.leaves()
    if leaves is None or not all(_can_be_read(leaf, cast.x) for leaf in leaves):
        return None
    for source, order in _candidates(len(leaves)):
        if between.computes(source, [leaves[i] for i in order]):
            return MadeCast(cast, source, tuple(leaves[i] for i in order))
    return None


def _candidates(count: int) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (name, order)
        for name, source in sources.SOURCES.items()
        if source.inputs == count
        for order in permutations(range(count))
    ]


def read_by_casts_only(x: fx.Node) -> bool:
    """Or by what is computed elementwise: else the tensor is stored anyway, and the cast had better read that."""
    return _only_casts_below(unrounded(x))


def _only_casts_below(node: fx.Node) -> bool:
    return all(
        is_cast(user) or user.target in _FUSED_ANYWAY or (is_transparent(user) and _only_casts_below(user))
        for user in node.users
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
        if is_transparent(node):
            return True
        if node.op != "call_function" or node.target not in POINTWISE:
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
        if is_transparent(node):
            known[node] = self._evaluate(seen_by(node), known)
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
    of = unrounded(seen_by(node))
    if node.target is aten.le.Scalar:
        if node.args[1] != 0:
            return False
        if of.target is aten.relu.default:
            of = unrounded(seen_by(of))
    return of.target not in POINTWISE


def _numbers(count: int) -> list[Tensor]:
    """Vectors of numbers to compare two functions of `count` arguments on: any, and each combination of some."""
    generator = torch.Generator().manual_seed(0)
    some = torch.tensor([-60.0, -8.0, -1.0, -1e-3, 0.0, 1e-3, 0.5, 3.0, 20.0, 60.0], dtype=torch.float64, device="cpu")
    grid = torch.cartesian_prod(*[some] * count).view(-1, count).unbind(1)
    drawn = torch.randn(count, 64, dtype=torch.float64, generator=generator, device="cpu") * 2
    return [torch.cat(parts) for parts in zip(drawn, grid, strict=True)]
