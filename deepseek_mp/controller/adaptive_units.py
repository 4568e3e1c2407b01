"""What live precision knows of a layer: beforehand, where it stands, and of a comparison of all of them with FP32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepseek_mp.precision import Operand
from deepseek_mp.sensitivity import UnitReading


@dataclass(frozen=True, kw_only=True)
class AdaptiveUnit:
    """What is known of a layer beforehand."""

    macs: float
    seconds: Mapping[str, float]
    """Measured time of its calls in a step, by recipe; empty where nothing was timed."""
    recipes: tuple[str, ...]
    """What it can run in beside the base: lower ones, and plain ones above it."""
    inputs: int = 0
    """Numbers in its input, which is kept for backward; 0: not known."""
    block: str = ""
    """The block that is compiled by itself and that it is part of; empty where there is none."""


@dataclass
class UnitState:
    """Where a layer stands."""

    recipe: str
    votes: int = 0
    locked_until: int = 0
    patience: int = 0
    kurtosis: float | None = None
    """Of its input, when it was lowered."""
    alarmed: bool = False
    """Whether a guard raised it and no probe has looked at it since."""
    suspected: bool = False
    """Whether grown outliers seemed to do harm in the last probe, and the next one has to say so too."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The loss of one batch in the plan in force and in FP32."""

    loss: float
    exact: float
    standard_error: float
    """Of the change in one batch, by the first order's scatter: what chance decides."""


def is_finite(reading: UnitReading) -> bool:
    """Whether the batch that it is of had finite numbers here: one that the trainer skips says nothing.

    An infinite effect is something else: of values that would overflow in a recipe.
    """
    gradients = reading.spreads[Operand.GRAD_OUTPUT].get("non_finite", 0.0)
    return math.isfinite(reading.energy) and math.isfinite(reading.row_energy) and not gradients


def as_past(reading: UnitReading, batches: int) -> UnitReading | None:
    """The reading as the past of a new one: it counts as so many batches at most, and its largest magnitudes fade to
    half in as many probes. None where an output overflowed in some recipe: a mean would never forget that.
    """
    if not all(math.isfinite(effect.loss_change) for effect in reading.effects.values()):
        return None
    fade = 0.5 ** (1 / batches)
    spreads = {
        which: {field: value * fade if field == "amax" else value for field, value in values.items()}
        for which, values in reading.spreads.items()
    }
    return replace(reading, batches=min(reading.batches, batches), calls=min(reading.calls, batches), spreads=spreads)


def plain(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Evidence that JSON can hold: an infinite number as text."""
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for key, value in evidence.items()
    }
