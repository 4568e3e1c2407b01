"""What was decided for each large linear layer of a served model, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from deepseek_mp.report.group import grouped
from deepseek_mp.report.table import paragraph, table

_HEAD = ("layers", "number", "kind", "saved µs", "error", "why")


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """One layer's kind, with its numbers for one call of the model."""

    layer: str
    kind: str | None
    """None: as the format says."""
    why: str
    saved_us: float | None = None
    """Microseconds that the layer alone takes less than in 16 bits: of its kind, or of the best one if it has none."""
    error: float | None = None
    """Its share of the metric (of `relative` its square), beyond that of 16 bits; None where it was not measured."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The kinds of a model's linear layers, chosen one by one, or why they were not."""

    why: str
    choices: tuple[LayerChoice, ...] = ()

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """As `Form.layers` has them; empty where no layer has a kind of its own."""
        return tuple((choice.layer, choice.kind) for choice in self.choices if choice.kind is not None)

    def to_json(self) -> dict[str, Any]:
        return {"why": self.why, "choices": [choice.to_json() for choice in self.choices]}

    def lines(self, width: int) -> list[str]:
        """A sentence, and a table in which layers of one kind and reason whose names differ in numbers are one row.

        Microseconds and errors of a row are sums.
        """
        return [*paragraph(f"kinds by layer: {self.why}", width), *table(_HEAD, self._rows(), width)]

    def _rows(self) -> Iterator[tuple[str, ...]]:
        by_name = {choice.layer: choice for choice in self.choices}
        for group in grouped((choice.layer, (choice.kind or "as the format", choice.why)) for choice in self.choices):
            some = [by_name[layer] for layer in group.layers]
            saved = [choice.saved_us for choice in some if choice.saved_us is not None]
            errors = [choice.error for choice in some if choice.error is not None]
            numbers = (f"{math.fsum(saved):.4g}" if saved else "", f"{math.fsum(errors):.2g}" if errors else "")
            yield (group.pattern, str(len(some)), group.key[0], *numbers, group.key[1])
