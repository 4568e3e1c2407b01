"""What the monitor says of one layer: values on the host, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SAMPLED = "sampled"
NOT_YET = "not sampled yet"
COMPILED = "not sampled because compiled"


@dataclass(frozen=True, slots=True)
class Value:
    """A number of the latest sample, and its exponential mean over the samples; None where it is not known."""

    last: float | None
    mean: float | None

    def to_json(self) -> dict[str, float | None]:
        return {"last": _short(self.last), "mean": _short(self.mean)}


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """One tensor of a layer, over its sampled rows."""

    samples: int
    spread: Mapping[str, Value]
    """`SPREAD_FIELDS` -> value."""
    errors: Mapping[str, Mapping[str, Value]]
    """'in_use', or the name of a format or recipe one asked about -> `ERROR_FIELDS` -> value."""

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "spread": {name: value.to_json() for name, value in self.spread.items()},
            "errors": {
                way: {name: value.to_json() for name, value in fields.items()} for way, fields in self.errors.items()
            },
        }


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """One layer. What was not sampled is absent, and `status` says why."""

    layer: str
    status: str
    """'sampled', 'not sampled yet' or 'not sampled because compiled'."""
    recipe: str | None = None
    """What it ran in when it was last sampled."""
    tensors: Mapping[str, TensorStatistics] = field(default_factory=dict)
    """'input', 'weight', 'grad_output' -> statistics."""
    updates: int = 0
    """Optimizer steps that were sampled."""
    update: Mapping[str, Value] = field(default_factory=dict)
    """`UPDATE_FIELDS` -> value."""
    non_finite: Mapping[str, int] = field(default_factory=dict)
    """'input', 'output', 'grad_output', 'weight' -> values that were infinite or NaN, in whole tensors."""
    produced: Mapping[str, int] = field(default_factory=dict)
    """'forward', 'backward' -> sampled steps in which it was the first to make such values of finite ones."""

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "status": self.status,
            "recipe": self.recipe,
            "tensors": {name: tensor.to_json() for name, tensor in self.tensors.items()},
            "updates": self.updates,
            "update": {name: value.to_json() for name, value in self.update.items()},
            "non_finite": dict(self.non_finite),
            "produced": dict(self.produced),
        }


def known(number: float) -> float | None:
    """The number, or None in place of NaN."""
    return None if math.isnan(number) else number


def _short(number: float | None) -> float | None:
    """Four digits are more than a sample holds."""
    return None if number is None else float(f"{number:.4g}")
