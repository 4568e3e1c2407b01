"""What a report knows of one unit: a read-only mapping, and plain JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

FAMILIES = ("tf32", "bf16", "fp16", "fp8", "fp4")
"""What has a `<family>_loss` of its own; of several recipes the worst that the unit can take counts."""
_NO_LOSS = ("fp32", "fp64", "hf32")


def family_of(recipe: str) -> str | None:
    """The family of a recipe's name: itself for plain formats, fp4 for nvfp4, else fp8; None for fp32 and wider."""
    if recipe in FAMILIES:
        return recipe
    if recipe in _NO_LOSS:
        return None
    return "fp4" if recipe.startswith("nvfp4") else "fp8"


class UnitProfile(Mapping[str, Any]):
    """A mapping with the keys below, the later ones only where they were measured.

    kind, parameters, shape       class of the module, how many numbers, shape of its weight or None
    fp16_loss, bf16_loss, ...     predicted relative change of the loss by that format in fprop, emulated if need be;
                                  of several FP8 recipes the worst; infinite where values overflow. A report without
                                  data has the relative error of the output in its place
    recommended, reason           recipe, and one line why
    spent                         what the recommendation takes: `loss` and `noise` of the budgets, `seconds` of a step,
                                  and whether these were `measured`
    not_analysed                  why there are no numbers, or None
    recipes                       by recipe: `loss`, the absolute changes `first`, `standard_error` and `second`,
                                  `noise` by role, and `errors` by role and operand (`ops.statistics.ERROR_FIELDS`);
                                  `taken`, whether the unit can run in it, and why not
    spreads                       of input, weight and grad_output (`ops.statistics.SPREAD_FIELDS`)
    milliseconds, saved_bytes     by recipe: measured time of its calls in a step, and bytes kept for backward less
    true_change, true_error       by recipe, absolute, where the estimate was verified, and its standard error
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = deepcopy(dict(values))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def with_values(self, **values: Any) -> UnitProfile:
        """The same profile with these keys set."""
        return UnitProfile({**self._values, **values})

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite loss is the text 'inf', since JSON has no such number."""
        written: dict[str, Any] = _written(self._values)
        return written

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UnitProfile:
        return cls(_read(data))

    def __repr__(self) -> str:
        losses = ", ".join(f"{key}={value:.1e}" for key, value in self.items() if key.endswith("_loss") and value)
        return f"<UnitProfile {self['kind']}: {self['recommended']}{f' ({losses})' if losses else ''}>"


def largest_loss(unit: UnitProfile) -> tuple[str, float]:
    """The recipe with the largest finite predicted loss, and that loss; ("", 0.0) if there is none."""
    losses = {name: values["loss"] for name, values in unit.get("recipes", {}).items()}
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    worst = max(finite, key=finite.__getitem__, default="")
    return worst, finite.get(worst, 0.0)


def riskiest(units: Mapping[str, UnitProfile], count: int) -> list[str]:
    """The units with the largest predicted change in any recipe, the riskiest first."""
    measured = [name for name, unit in units.items() if unit.get("recipes")]
    return sorted(measured, key=lambda name: largest_loss(units[name])[1], reverse=True)[:count]


def _written(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read(item) for item in value]
    return float(value) if value in ("inf", "-inf") else value
