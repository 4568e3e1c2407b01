"""The first samples of a batch, as a batch of the same form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from deepseek_mp.nn.call import Call, batch_size, parse_batch
from deepseek_mp.nn.nested import map_leaves

LEAST_ITEMS = 8
"""Norms of the batch are another function for very few items, with other gradients."""


def first_samples(batch: Any, count: int) -> Any:
    """The batch with its first samples alone: every tensor whose first dimension is the batch's is cut.

    Args:
        batch: as for `step`; tensors in tuples, lists, mappings and dataclasses, however deep. A packed sequence stays
            whole.
        count: from 1 to the number of samples.
    """
    size = batch_size(parse_batch(batch))

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[:count] if leaf.dim() and leaf.shape[0] == size else leaf
        if isinstance(leaf, Mapping):  # with a `to` of its own, as a tokenizer's output
            return {key: map_leaves(item, cut) for key, item in leaf.items()}
        return leaf

    return map_leaves(batch, cut)


def part_of(call: Call, share: float) -> Call:
    """The first items of the batch, at least `LEAST_ITEMS`.

    Only where every tensor begins with the batch's extent: a graph's edges or flattened targets mean something else.
    The whole batch otherwise.
    """
    items = batch_size(call)
    wanted = max(LEAST_ITEMS, round(share * items))
    leaves: list[Any] = []
    map_leaves((call.args, call.kwargs, call.target), leaves.append)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    packed = any(isinstance(leaf, PackedSequence) for leaf in leaves)
    if wanted >= items or packed or any(tensor.shape[0] != items for tensor in tensors):
        return call

    parts: dict[int, Tensor] = {}

    def cut(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.dim()):
            return leaf
        return parts.setdefault(id(leaf), leaf[:wanted])  # labels that are the target stay the same object

    args, kwargs, target = map_leaves((call.args, call.kwargs, call.target), cut)
    return replace(call, args=args, kwargs=kwargs, target=target)
