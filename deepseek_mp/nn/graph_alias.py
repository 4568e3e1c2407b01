"""Inputs of a captured graph that lie in one memory and share nothing of it, described to the compiler as apart.

Operations with graphs of their own, such as `torch.cond`, are refused where two of their inputs are of one memory,
whether they overlap or not. Weights that were laid beside each other (`inference.beside`) are such inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor


def described_apart(graph: fx.GraphModule, inputs: Sequence[Any], weights: Collection[int]) -> list[Any]:
    """The inputs for the compiler: weights of one memory without values, each as in a memory of its own.

    Args:
        graph: one without operations that have graphs is given its inputs as they are.
        inputs: its inputs, with values.
        weights: where they may lie; inputs that lie elsewhere stay.
    """
    mode = detect_fake_mode()
    if mode is None or not any(isinstance(node.target, HigherOrderOperator) for node in graph.graph.nodes):
        return list(inputs)
    found: dict[int, list[Tensor]] = {}
    for one in inputs:
        if _is_dense(one) and one.data_ptr() in weights:
            found.setdefault(one.untyped_storage().data_ptr(), []).append(one)
    made: dict[int, Tensor] = {}
    for tensors in found.values():
        if len(tensors) > 1 and all(_disjoint(*pair) for pair in combinations(tensors, 2)):
            with mode:
                made.update((id(one), _alone(one)) for one in tensors)
    return [made.get(id(one), one) for one in inputs]


def _alone(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _is_dense(one: Any) -> bool:
    return isinstance(one, Tensor) and not isinstance(one, FakeTensor) and one.layout is torch.strided


def _disjoint(one: Tensor, other: Tensor) -> bool:
    """Whether they have no element in common; False where that is not seen easily."""
    first, second = sorted((one, other), key=Tensor.storage_offset)
    if not first.numel() or not second.numel() or one.element_size() != other.element_size():
        return False
    start, next_start = first.storage_offset(), second.storage_offset()
    if start + _extent(first) <= next_start:
        return True
    if first.dim() != 2 or first.stride() != second.stride() or first.stride(1) != 1:
        return False
    between, width = next_start - start, first.stride(0)  # both are columns of one matrix
    return between < width and first.shape[1] <= between and between + second.shape[1] <= width


def _extent(tensor: Tensor) -> int:
    """Elements from its first to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
