"""What live precision knows of a layer: beforehand, where it stands, and of a comparison of all of them with FP32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The loss of one batch in the plan in force and in FP32."""

    loss: float
    exact: float
    standard_error: float
    """Of the change in one batch, by the first order's scatter: what chance decides."""
