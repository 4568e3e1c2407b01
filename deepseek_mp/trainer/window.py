"""An accumulation window: the micro-batches between two optimizer steps, weighted exactly.

The gradient of the window is that of the mean over all its items (samples, or tokens where targets
are masked), whatever the sizes of its micro-batches and however many there are. Each micro-batch's
mean loss is weighted by its items relative to the first one's, which keeps the numbers that
backward sees near those of a single batch (they must fit fp16), and the sum of the weights divides
the gradients at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Items = int | Tensor
Weight = float | Tensor
TOTALS = ("largest", "reference", "weight", "loss", "nonfinite")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What replaying a micro-batch needs."""

    index: int
    """Position within the epoch."""
    batch: Any
    """As loaded, before it was moved to the device."""
    rng: list[Tensor]
    """States of the CPU's and the device's generator just before its forward."""


@dataclass(kw_only=True)
class Window:
    """Running totals of a window; on the device where a loss is."""

    entries: list[MicroBatch] = field(default_factory=list)
    micro_batches: int = 0
    samples: int = 0
    largest: Weight | None = None
    """Most items that any micro-batch had so far, in earlier windows too."""
    reference: Weight | None = None
    weight: Weight = 0.0
    only: Items | None = None
    """Items of a micro-batch that is a whole window, whose weight is one however many they are."""
    loss: Tensor | None = None
    nonfinite: Tensor | None = None

    def weigh(self, items: Items, *, whole: bool = False) -> Weight:
        """The weight of a micro-batch of `items`, counted into the window; `whole`: there is no other."""
        if whole:
            self.only, self.weight = items, 1.0
            return 1.0
        if isinstance(items, Tensor):
            items = items.to(torch.float32)
        self.largest = _larger(items, 1.0 if self.largest is None else self.largest)
        if self.reference is None:
            self.reference = self.largest
        weight = items / self.reference
        self.weight = self.weight + weight
        return weight

    def add(self, loss: Tensor, weight: Weight) -> None:
        """Count a micro-batch's loss (0-dim, mean over its items)."""
        value = loss.detach().to(torch.float32)
        bad = torch.isfinite(value).logical_not_().to(torch.float32)
        part = value * weight
        self.loss = part if self.loss is None else self.loss + part
        self.nonfinite = bad if self.nonfinite is None else torch.maximum(self.nonfinite, bad)

    @property
    def empty(self) -> Tensor | None:
        """Whether no micro-batch had an item, 0-dim bool; None where the host knows that one had."""
        items = self.weight if self.only is None else self.only
        return items == 0 if isinstance(items, Tensor) else None

    @property
    def divisor(self) -> Tensor | None:
        """What the accumulated gradients are divided by; None when it is one. Never zero."""
        if self.loss is None or (isinstance(self.weight, float) and self.weight == 1.0):
            return None
        if isinstance(self.weight, Tensor):
            return torch.where(self.weight == 0, 1.0, self.weight).to(self.loss.device)
        return torch.full((), self.weight, dtype=torch.float32, device=self.loss.device)  # tensor() would wait

    def mean_loss(self, divisor: Tensor | None) -> Tensor:
        """Mean loss over the window's items, 0-dim; `divisor` is this window's own."""
        assert self.loss is not None, "a window without a loss is not closed with a step"
        return self.loss if divisor is None else self.loss / divisor

    def save(self) -> dict[str, Any]:
        """The totals as JSON values; exact, since float32 fits a JSON number."""
        return {
            "micro_batches": self.micro_batches,
            "samples": self.samples,
            **{name: _to_json(getattr(self, name)) for name in TOTALS},
        }

    @classmethod
    def load(cls, saved: Mapping[str, Any], device: torch.device) -> Window:
        """The window that `save` wrote, without the batches it has seen."""
        totals = {name: _from_json(saved[name], device) for name in TOTALS}
        return cls(micro_batches=saved["micro_batches"], samples=saved["samples"], **totals)


def _larger(items: Items, other: Weight) -> Weight:
    if isinstance(items, Tensor):
        return items.clamp(min=other)
    return torch.clamp(other, min=items) if isinstance(other, Tensor) else float(max(items, other))


def _to_json(value: Weight | None) -> dict[str, Any] | None:
    return None if value is None else {"value": float(value), "tensor": isinstance(value, Tensor)}


def _from_json(saved: Mapping[str, Any] | None, device: torch.device) -> Any:
    if saved is None:
        return None
    return torch.tensor(saved["value"], device=device) if saved["tensor"] else saved["value"]
