"""What it takes to compute a value again in the backward, for the compiler's partitioner: a roofline.

Under an activation budget the partitioner of PyTorch (torch._functorch.partitioners) decides which products and
reductions run twice by a time for each (a knapsack). By default that time is the number of floating-point operations,
where everything but products counts 1. Next to 1e10 for a product a 1 is lost in the knapsack's FP32 sums: as soon as
one product has to be computed again, so are all reductions, the statistics of every BatchNorm among them, each a pass
over memory that frees a few KiB. And products with few channels, which are limited by memory, look cheaper than those
with many, which take the same time and free as much.

Here the time is that of the slower of two: its operations, or moving its bytes (Williams et al., "Roofline", 2009); and
a launch. A reduction, into which the compiler fuses what is elementwise before it, moves what lies in memory anyway.
"""

from __future__ import annotations

import torch
import torch._functorch.config as partitioner
from torch import Tensor, fx
from torch._functorch import partitioners
from torch._inductor.custom_graph_pass import CustomRuntimeEstimator, get_hash_for_files
from torch.utils.flop_counter import flop_registry

from deepseek_mp.trainer import recompute_rules

FLOPS_PER_BYTE = {1: 240.0, 2: 120.0, 4: 30.0, 8: 10.0}
"""Operations of a product in the time in which one byte is moved, by the bytes of an element of its operands.

Dense peak over bandwidth is 156 in BF16 on an A100, 206 on an H200, 247 on an MI300X, 281 on a B200; products reach
about 60 % of the one, and kernels nearly all of the other. For FP32 it lies between what such devices do with TF32
(half of BF16) and without it (14 on an H200). Choices hang on the order of magnitude only.
"""
LAUNCH_BYTES = 8e6
"""Bytes that are moved in the time that one more kernel takes to start and to end: 2 us at 4 TB/s."""
REDUCES = 4
"""A value of fewer bytes than a fourth of its arguments' is a reduction to the partitioner: kept if it can be."""


class Roofline(CustomRuntimeEstimator):
    """Time of a node of a joint graph, in bytes that the device would move meanwhile."""

    def __call__(self, node: fx.Node) -> float:
        moved = float(_bytes(node) + _Graph().moved_for(node))
        return max(_flops(node) / _flops_per_byte(node), moved) + LAUNCH_BYTES

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, recompute_rules.__file__))  # what is cached was made by both


def _bytes(node: fx.Node) -> int:
    return partitioners._size_of(node)  # noqa: SLF001 - of a tuple: of all its tensors


def _flops(node: fx.Node) -> float:
    if getattr(node.target, "overloadpacket", None) not in flop_registry:
        return 0.0
    with partitioner.patch(activation_memory_budget_runtime_estimator="flops"):
        return partitioners.estimate_runtime(node)


def _flops_per_byte(node: fx.Node) -> float:
    values = [argument.meta.get("val") for argument in node.all_input_nodes]
    sizes = [value.element_size() for value in values if isinstance(value, Tensor)]
    return FLOPS_PER_BYTE.get(min(sizes, default=4), FLOPS_PER_BYTE[4])


class _Graph:
    """What lies in memory, and what is computed inside the kernels that read it."""

    def __init__(self) -> None:
        self._ops = partitioners.get_default_op_list()

    def moved_for(self, node: fx.Node) -> int:
        """Bytes that are moved so that `node` has its arguments."""
        if self._takes_in(node):
            return sum(map(_bytes, self._read(node)))
        return sum(self._moved_for_argument(argument, node) for argument in node.all_input_nodes)

    def _moved_for_argument(self, argument: fx.Node, reader: fx.Node) -> int:
        """An argument that the backward would not store for another reader is made for this one."""
        while argument.op == "call_function" and self._ops.is_view(argument):
            argument = argument.all_input_nodes[0]
        stored = argument.op != "call_function" or not self._ops.is_fusible(argument) or self._reduces(argument)
        if stored or any(other is not reader for other in self._products_of(argument)):
            return _bytes(argument)
        return 2 * _bytes(argument) + sum(map(_bytes, self._read(argument)))

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """What the kernel reads into which `node` is fused."""
        found: dict[fx.Node, None] = {}
        waiting, seen = list(node.all_input_nodes), set[fx.Node]()
        while waiting:
            argument = waiting.pop()
            if argument in seen:
                continue
            seen.add(argument)
            if self._lies_in_memory(argument):
                found[argument] = None
            else:
                waiting.extend(argument.all_input_nodes)
        return list(found)

    def _lies_in_memory(self, node: fx.Node) -> bool:
        if node.op != "call_function" or not self._ops.is_fusible(node) or self._reduces(node):
            return True
        return not self._ops.is_view(node) and bool(self._products_of(node))

    def _products_of(self, node: fx.Node) -> list[fx.Node]:
        """Readers, through views, into which nothing is fused."""
        found: list[fx.Node] = []
        waiting = list(node.users)
        for user in waiting:
            if self._ops.is_view(user):
                waiting.extend(user.users)
            elif user.op != "output" and not self._takes_in(user):
                found.append(user)
        return found

    def _takes_in(self, node: fx.Node) -> bool:
        """Whether what is computed just before `node` becomes part of its kernel."""
        return self._ops.is_fusible(node) or node.target is torch.ops.aten.cat.default

    def _reduces(self, node: fx.Node) -> bool:
        return REDUCES * _bytes(node) < sum(map(_bytes, node.all_input_nodes))
