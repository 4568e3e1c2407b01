"""What a forward saved for its backward, by module: in which form, why, and in how many bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class SavedForm(StrEnum):
    """How a saved tensor is held until the backward."""

    KEPT = "kept"
    """As it is."""
    FP8 = "fp8"
    """E4M3 with a scale for each group."""
    BITS = "bits"
    """One bit for each value, exact."""
    RECOMPUTED = "recomputed"
    """Computed again from a tensor that is kept, exact."""
    SHARED = "shared"
    """Saved before in this forward; no bytes of its own."""


class SavedReason(StrEnum):
    """Why a saved tensor has its form."""

    COMPRESSED = "compressed"
    EXACT = "exact"
    """The backward reads no more than this form holds."""
    SAVED_BEFORE = "saved_before"
    SMALL = "small"
    ASKED = "asked"
    """A pattern of `ActivationSettings.keep` matches the module."""
    WEIGHT_CAST = "weight_cast"
    """A parameter in another format or layout."""
    NARROW = "narrow"
    """Already 8 bits or fewer, or integers."""
    WIDE = "wide"
    """FP64 or complex."""
    LAYOUT = "layout"
    """Not dense in memory, or not a plain tensor."""
    DEVICE = "device"
    """On a device where this is not known to work."""
    NO_GRADIENT = "no_gradient"
    """Data, a constant, or a statistic that an operation saved for itself: what it is for is not known."""
    OPERATION = "operation"
    """The operation is not one whose backward bears rounded inputs, or it is not known: a function of the user's own,
    compiled code, a region that is checkpointed."""
    STATISTIC = "statistic"
    """A result that a backward divides by, or takes the exponential of."""
    RECOMPUTED_FROM = "recomputed_from"
    """What another tensor is computed again from."""


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Tensors of one module, operation, form and reason."""

    module: str
    """Qualified name; '' is outside all submodules."""
    operation: str
    """Function that saved them; '' where it is not known."""
    form: SavedForm
    reason: SavedReason
    tensors: int
    bytes_before: int
    """Bytes that they would have taken; 0 for one that was saved before."""
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "operation": self.operation,
            "form": self.form.value,
            "reason": self.reason.value,
            "tensors": self.tensors,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A BatchNorm followed by a ReLU, and whether its output is computed again."""

    module: str
    """That of the BatchNorm."""
    recomputed: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"module": self.module, "recomputed": self.recomputed, "reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class ActivationRecord:
    """All that a forward saved, but for parameters, buffers and their views, which are there anyway.

    A tensor that somebody else holds too (a batch of the data, a view of a storage of which another view is kept) is
    counted as if it were held for the backward alone.
    """

    saved: tuple[SavedActivations, ...]
    pairs: tuple[Pair, ...]

    @property
    def bytes_before(self) -> int:
        return sum(entry.bytes_before for entry in self.saved)

    @property
    def bytes_after(self) -> int:
        return sum(entry.bytes_after for entry in self.saved)

    def by_module(self) -> dict[str, tuple[int, int]]:
        """Bytes before and after of each module, the largest first."""
        return _summed((entry.module, entry) for entry in self.saved)

    def by_form(self) -> dict[str, tuple[int, int]]:
        """Bytes before and after of each form, the largest first."""
        return _summed((entry.form.value, entry) for entry in self.saved)

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "saved": [entry.to_json() for entry in self.saved],
            "pairs": [pair.to_json() for pair in self.pairs],
        }


def _summed(entries: Iterable[tuple[str, SavedActivations]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for key, entry in entries:
        before, after = found.get(key, (0, 0))
        found[key] = before + entry.bytes_before, after + entry.bytes_after
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
