"""What the loss averages over, and which of it is looked at.

An estimate needs, per independent term of the loss, how much a changed output of a layer moves the loss. Where every
row of the layer's output is a term of its own (a token of a language model) rows are drawn; where many rows make one
term (the pixels of an image) whole items of the batch are, and the rows of an item are added up before squaring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.nn.call import Call, LossFn, Result, batch_size
from deepseek_mp.nn.loss import is_integer

SMALLEST_LOSS = 1e-30


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How the terms of the loss lie in a batch, known before the forward."""

    positions: int
    """Terms, with those that are ignored: what the rows of a layer are compared with."""
    items: int
    """Samples in the batch."""

    @classmethod
    def of(cls, call: Call) -> BatchLayout:
        target, items = call.target, batch_size(call)
        labels = isinstance(target, Tensor) and is_integer(target)
        return cls(positions=target.numel() if labels else items, items=items)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of one batch's loss, known after the forward: their number, and the curvature along the gradient.

    `curvature` turns squared gradients into second derivatives. For a loss that is a mean negative log-likelihood
    (cross entropy) it is 1: the expected squared gradient is the Fisher information, which is the expected second
    derivative. A mean squared error L is such a likelihood, of normal errors with variance L, times 2 L: 1 / (2 L).
    """

    count: int | Tensor
    """Terms that the loss averages over."""
    loss: Tensor
    """The mean, 0-dim, detached."""
    curvature: float | Tensor = 1.0

    @classmethod
    def of(cls, found: Result, loss_fn: LossFn | None) -> Terms:
        loss = found.loss.detach().float()
        squared = found.loss_name == "mse" or loss_fn is F.mse_loss or isinstance(loss_fn, nn.MSELoss)
        curvature = 1 / (2 * loss.clamp(min=SMALLEST_LOSS)) if squared else 1.0
        return cls(count=found.items, loss=loss, curvature=curvature)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The part of a unit's input and output that is looked at: some rows, some items, or all there is."""

    index: Tensor | None
    """Which rows or items; None: all."""
    by_row: bool
    """Rows of the tensor flattened to [rows, last], each a term; else items of its first extent."""
    groups: int
    """How many there are in the whole batch."""

    def of(self, x: Tensor) -> Tensor:
        """The sample of an input or output: [m, last] of rows, [m, ...] of items; detached, FP32."""
        x = x.detach()
        if self.by_row:
            x = x.reshape(-1, x.shape[-1])
        return (x if self.index is None else x.index_select(0, self.index)).float()


def draw(
    x: Tensor, layout: BatchLayout, *, rows: int, items: int, rowwise: bool, whole: bool, generator: torch.Generator
) -> Sample:
    """A sample of a tensor [..., last] or [items, ...].

    Args:
        x: the unit's output.
        layout: how the terms of the loss lie in the batch.
        rows: at most so many rows.
        items: at least so many items, where items are drawn.
        rowwise: whether the unit treats every row of [..., last] alone.
        whole: whether it must see all items together (batch norm).
        generator: on the device of x.
    """
    count = x.numel() // max(x.shape[-1], 1) if x.dim() else 0
    first = x.shape[0] if x.dim() else 0
    if rowwise and (count == layout.positions or first != layout.items):
        return Sample(index=_some(count, rows, generator), by_row=True, groups=count)
    if whole:
        return Sample(index=None, by_row=False, groups=first)
    wanted = max(items, rows * first // max(count, 1))
    return Sample(index=_some(first, wanted, generator), by_row=False, groups=first)


def _some(count: int, wanted: int, generator: torch.Generator) -> Tensor | None:
    if count <= wanted:
        return None
    return torch.randperm(count, generator=generator, device=generator.device)[:wanted]
