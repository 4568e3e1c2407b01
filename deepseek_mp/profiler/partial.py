"""What a profile has measured so far, on disk, so that it can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.records.durable import replace_text
from deepseek_mp.sensitivity import UnitReading

CLOSE = 1e-4
"""Relative difference of the first loss that another number of threads may make."""


@dataclass(frozen=True, kw_only=True)
class Partial:
    """Readings of the first batches; an empty one before any."""

    seen: int = 0
    """Batches taken from the loader, those that were left out included."""
    counted: int = 0
    loss: float = 0.0
    """Mean over the batches that counted."""
    curvature: float = 1.0
    readings: Mapping[str, UnitReading] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def joined(self, other: Partial) -> Partial:
        """These batches and those that came after."""
        both = self.counted + other.counted
        share = self.counted / both if both else 0.0
        readings = dict(self.readings)
        for name, reading in other.readings.items():
            readings[name] = readings[name].joined(reading) if name in readings else reading
        return Partial(
            seen=self.seen + other.seen,
            counted=both,
            loss=share * self.loss + (1 - share) * other.loss,
            curvature=share * self.curvature + (1 - share) * other.curvature,
            readings=readings,
            unmeasured={n: why for n, why in {**self.unmeasured, **other.unmeasured}.items() if n not in readings},
            skipped=self.skipped + other.skipped,
        )

    def save(self, path: str | Path, asked: Mapping[str, Any]) -> None:
        """Write it, with what was asked for, so that nothing else is resumed with it."""
        data = {
            "asked": dict(asked),
            "seen": self.seen,
            "counted": self.counted,
            "loss": self.loss,
            "curvature": self.curvature,
            "readings": {name: reading.to_json() for name, reading in self.readings.items()},
            "unmeasured": dict(self.unmeasured),
            "skipped": list(self.skipped),
        }
        replace_text(Path(path), json.dumps(data) + "\n")

    @classmethod
    def load(cls, path: str | Path, asked: Mapping[str, Any]) -> Partial:
        """What `save` wrote; an empty one if there is no file. `ConfigError` if it was of another question."""
        if not Path(path).exists():
            return cls()
        data = _read(Path(path))
        if not _is_same(data["asked"], json.loads(json.dumps(asked))):
            allowed = "the file of a profile of the same model and weights, recipes, loss, seed and first batch"
            raise ConfigError(
                explain(f"resume={str(path)!r}, which is of another profile", allowed, "Name another file")
            )
        return cls(
            seen=data["seen"],
            counted=data["counted"],
            loss=data["loss"],
            curvature=data["curvature"],
            readings={name: UnitReading.from_json(value) for name, value in data["readings"].items()},
            unmeasured=data["unmeasured"],
            skipped=tuple(data["skipped"]),
        )


def _is_same(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether all values are equal, and numbers as close as the same computation comes."""
    return kept.keys() == asked.keys() and all(
        math.isclose(kept[key], value, rel_tol=CLOSE)
        if isinstance(value, float) and isinstance(kept[key], float)
        else kept[key] == value
        for key, value in asked.items()
    )


def _read(path: Path) -> dict[str, Any]:
    """The object in the file; `ConfigError` for anything else."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        data = error
    if isinstance(data, dict) and "asked" in data:
        return data
    passed = f"resume={str(path)!r}, which holds no measurements of a profile"
    raise ConfigError(explain(passed, "a file that an earlier profile wrote, or a new path", "Name another file"))
