"""Several copies of one model that keep only one of each weight that they have alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn


def share_weights(models: Iterable[nn.Module]) -> list[bool]:
    """Parameters and buffers of one name, format, layout and value become those of the first model that has them.

    Buffers that models write to are shared too, so that what one keeps in them the others see.

    Returns:
        Of each model, whether tensors of it are now those of one before it.
    """
    known: dict[str, list[Tensor]] = {}
    changed = []
    for model in models:
        twins = dict(_twins(model, known))
        if twins:
            twins.update(_released(model, twins, known))
            # As `to` changes a module: parameters stay the objects that they are.
            model._apply(lambda tensor, twins=twins: twins.get(id(tensor), tensor))  # noqa: SLF001
        changed.append(bool(twins))
    return changed


def _twins(model: nn.Module, known: dict[str, list[Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """By the tensor's id what is to take its place; those without become known."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        others = known.setdefault(name, [])
        if any(other.data_ptr() == tensor.data_ptr() for other in others):
            continue
        twin = next((other for other in others if _alike(tensor, other)), None)
        if twin is None:
            others.append(tensor)
        else:
            yield id(tensor), twin


def _released(
    model: nn.Module, twins: dict[int, Tensor], known: dict[str, list[Tensor]]
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Copies of what stays the model's own in a memory of several tensors, so that no part of it is kept for nothing.

    Layers lie beside each other there (`inference.beside`).
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    left = {_memory(tensor) for _, tensor in named if id(tensor) in twins}
    for name, tensor in named:
        if id(tensor) not in twins and _memory(tensor) in left:
            own = tensor.detach().clone()
            known[name] = [own if other is tensor else other for other in known[name]]
            yield id(tensor), own


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _alike(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.device, one.shape, one.layout) != (other.dtype, other.device, other.shape, other.layout):
        return False
    return one.layout is torch.strided and one.stride() == other.stride() and torch.equal(one, other)
