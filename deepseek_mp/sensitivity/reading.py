"""What was measured of a unit, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_mp.precision import Operand, Role

SURE = 2.0
"""Standard errors by which a first-order change must differ from zero to count."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A recipe's effect through one unit, per batch; changes of the loss are absolute, in its own unit."""

    first: float
    """Change of the loss by the recipe's fprop, first order, signed."""
    standard_error: float
    """That of `first`, over the samples looked at."""
    second: float
    """Second order; not negative."""
    errors: Mapping[tuple[Role, Operand], Mapping[str, float]]
    """`measure.OPERAND_FIELDS` of each operand of each product."""

    @property
    def loss_change(self) -> float:
        """The rise of the loss to reckon with: `second`, and `first` where it is a rise beyond doubt.

        Infinite where the output overflows. A fall of the loss is not counted on.
        """
        if not math.isfinite(self.first) or not math.isfinite(self.second):
            return math.inf
        return self.second + (self.first if self.first > SURE * self.standard_error else 0.0)

    @property
    def expected_change(self) -> float:
        """The unbiased estimate: first plus second order, signed."""
        return self.first + self.second

    def product_error(self, role: Role, operand: Operand) -> float:
        """What the operand's errors are of the product's energy."""
        return self.errors[role, operand]["product"]

    def to_json(self) -> dict[str, Any]:
        errors: dict[str, dict[str, Any]] = {}
        for (role, operand), values in self.errors.items():
            errors.setdefault(role.value, {})[operand.value] = dict(values)
        own = {"first": self.first, "standard_error": self.standard_error, "second": self.second}
        return {**own, "errors": errors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Effect:
        errors = {
            (Role(role), Operand(operand)): dict(values)
            for role, operands in data["errors"].items()
            for operand, values in operands.items()
        }
        return cls(first=data["first"], standard_error=data["standard_error"], second=data["second"], errors=errors)


@dataclass(frozen=True, kw_only=True)
class UnitReading:
    """All that was measured of a unit, per batch."""

    order: int
    """Its place among the calls of the forward, from 0."""
    batches: int
    calls: int
    """Calls seen, over all batches."""
    effects: Mapping[str, Effect]
    """By recipe."""
    energy: float
    """How much the weight's gradient scatters from batch to batch: the variance of its estimate, added up."""
    row_energy: float
    """What relative errors of wgrad's operands are multiplied with to give the variance that they add."""
    spreads: Mapping[Operand, Mapping[str, float]]
    """`ops.statistics.SPREAD_FIELDS` of input, weight and output gradient.

    `amax` is the largest magnitude of the whole tensors in all calls; the others are means over the calls, of what was
    drawn."""

    def to_json(self) -> dict[str, Any]:
        return {
            "order": self.order,
            "batches": self.batches,
            "calls": self.calls,
            "effects": {name: effect.to_json() for name, effect in self.effects.items()},
            "energy": self.energy,
            "row_energy": self.row_energy,
            "spreads": {operand.value: dict(values) for operand, values in self.spreads.items()},
        }

    def joined(self, other: UnitReading) -> UnitReading:
        """This reading with that of more batches, weighted by their numbers; the largest magnitudes are the larger."""
        mine, both = self.batches, self.batches + other.batches
        share = mine / both
        calls = self.calls / (self.calls + other.calls)

        def mean(a: float, b: float, weight: float = share) -> float:
            return weight * a + (1 - weight) * b

        effects = {}
        for name, own in self.effects.items():
            more = other.effects[name]
            errors = {
                which: {field: mean(value, more.errors[which][field], calls) for field, value in values.items()}
                for which, values in own.errors.items()
            }
            error = math.hypot(share * own.standard_error, (1 - share) * more.standard_error)
            effects[name] = Effect(
                first=mean(own.first, more.first),
                standard_error=error,
                second=mean(own.second, more.second),
                errors=errors,
            )
        spreads = {
            which: {
                field: max(value, more) if field == "amax" else mean(value, more, calls)
                for field, value in values.items()
                for more in (other.spreads[which][field],)
            }
            for which, values in self.spreads.items()
        }
        return UnitReading(
            order=self.order,
            batches=both,
            calls=self.calls + other.calls,
            effects=effects,
            energy=mean(self.energy, other.energy),
            row_energy=mean(self.row_energy, other.row_energy),
            spreads=spreads,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UnitReading:
        plain = {name: data[name] for name in ("order", "batches", "calls", "energy", "row_energy")}
        return cls(
            **plain,
            effects={name: Effect.from_json(value) for name, value in data["effects"].items()},
            spreads={Operand(name): dict(values) for name, values in data["spreads"].items()},
        )
