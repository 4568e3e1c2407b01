"""What the compiler's partitioner may compute again in the backward under an activation budget, and what is work.

The partitioner (torch._functorch.partitioners) takes operations that it does not know for elementwise work, which the
compiler fuses into what reads it. Inside `rules`:

- **What is not fused is work.** Products in FP8, cuDNN's attention, casts, pools and concatenations have their place in
  the knapsack, each with its time, instead of being computed again all at once and for free. On an H200 a decoder of
  1.3 billion parameters was slower in FP8 than in BF16, since all its products ran twice.
- **What draws random numbers never runs twice.** PyTorch 2.11 and 2.13 draw new seeds in the backward once the budget
  is below what elementwise work alone frees: gradients then belong to another dropout mask than the loss, and nothing
  says so. Random numbers are still made again, from the same seeds.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, fx
from torch._functorch import partitioners
from torch.utils.checkpoint import CheckpointPolicy

_FUSED = ("prims::inductor_random", "prims::inductor_randint", "prims::inductor_lookup_seed")
"""Random numbers from a seed."""
_LEAST = 1e-6
"""Instead of a budget of 0, for which the partitioner keeps nothing but arguments, whatever the rules are."""


class OpTypes(partitioners.OpTypes):
    """The partitioner's kinds of operations, in which all that is not fused is work."""

    def is_compute_intensive(self, node: fx.Node) -> bool:
        if super().is_compute_intensive(node):
            return True
        return not self.is_fusible(node) and not _is_free(node) and _gives_tensors(node)


@contextmanager
def rules() -> Iterator[None]:
    """Inside, the partitioner keeps to the rules above; there is no public way to tell it."""
    listed, choose = partitioners.get_default_op_list, partitioners.choose_saved_values_set

    def kinds() -> OpTypes:
        ops = listed()
        return OpTypes(**{field.name: getattr(ops, field.name) for field in fields(ops)})

    def chosen(joint_graph: fx.Graph, node_info: partitioners.NodeInfo, memory_budget: float = 1) -> list[fx.Node]:
        drawn = [node for node in joint_graph.nodes if draws(node) and "recompute" not in node.meta]
        for node in drawn:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return _tensors(choose(joint_graph, node_info, memory_budget or (_LEAST if drawn else 0)))

    partitioners.get_default_op_list, partitioners.choose_saved_values_set = kinds, chosen
    try:
        yield
    finally:
        partitioners.get_default_op_list, partitioners.choose_saved_values_set = listed, choose


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers, so that it gives something else each time it runs."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and _argument(node, "dropout_p") != 0.0


def _argument(node: fx.Node, name: str) -> object:
    """The value of a named argument of an operation, its default if it is not given; None if there is no such one."""
    assert isinstance(node.target, torch._ops.OpOverload), "tags are those of an operation"  # noqa: SLF001
    for place, argument in enumerate(node.target._schema.arguments):  # noqa: SLF001
        if argument.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


def _tensors(saved: list[fx.Node]) -> list[fx.Node]:
    """Results of several tensors are kept one by one; the partitioner may name the whole, which cannot be kept."""
    whole = [node for node in saved if isinstance(node.meta.get("val"), tuple | list)]
    parts = [user for node in whole for user in node.users if user.target is operator.getitem]
    return [node for node in saved if node not in whole] + [part for part in parts if part not in saved]


def _gives_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value))


def _is_free(node: fx.Node) -> bool:
    """Whether a node is a view, or random numbers from a seed, which are made inside the kernels that read them."""
    if not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001
        return False
    schema = node.target._schema  # noqa: SLF001
    return schema.name in _FUSED or any(result.alias_info is not None for result in schema.returns)
