"""The lowest precision of each part of a simulation or model that holds a given error on a given metric.

A black box: nothing is known of it but what the metric is when its parts run in some formats. Each part alone first,
from the lowest format up; then all together, and while the error is too large the part that alone had the largest is
raised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_mp.errors import ConfigError, explain

Run = Callable[[Mapping[str, str]], float]
"""Formats by part, where a part that is not named runs in the highest, to the metric."""


@dataclass(frozen=True, kw_only=True)
class MetricReport:
    """What holds the tolerance, and what each part does alone."""

    formats: Mapping[str, str]
    """The lowest format found for each part; together they hold the tolerance."""
    reference: float
    """The metric with all parts in the highest format."""
    error: float
    """Relative error of the metric with `formats`."""
    tolerance: float
    alone: Mapping[str, Mapping[str, float]] = field(hash=False)
    """Relative error of the metric with one part alone in a format, as far as it was tried; infinite if not finite."""
    runs: int

    def to_json(self) -> dict[str, Any]:
        alone = {part: {f: _plain(e) for f, e in errors.items()} for part, errors in self.alone.items()}
        own = {"formats": dict(self.formats), "reference": self.reference, "error": self.error}
        return {**own, "tolerance": self.tolerance, "alone": alone, "runs": self.runs}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [f"metric {self.reference:.6g}, relative error {self.error:.2e} of {self.tolerance:.2e} allowed"]
        for part, chosen in self.formats.items():
            tried = ", ".join(f"{f} {error:.1e}" for f, error in self.alone[part].items())
            lines.append(f"{part or '(all)':40} {chosen:8} alone: {tried}")
        return "\n".join(lines)


def lowest_precision(
    run: Run,
    parts: Sequence[str],
    *,
    tolerance: float,
    formats: Sequence[str] = ("fp32", "bf16", "fp16"),
    progress: Callable[[str, float], None] | None = None,
) -> MetricReport:
    """The lowest format of each part with which the metric stays within `tolerance` of what the highest gives.

    Args:
        run: runs the simulation with parts in the formats given, deterministically, and returns the metric.
        parts: their names.
        tolerance: largest relative error of the metric; above a reference of zero, absolute.
        formats: from the highest to the lowest.
        progress: told what is being tried, and the share of the parts that is done.

    Raises:
        ConfigError: no parts or formats, a tolerance that is not positive, a metric that is no number, or a reference
            that is not finite.
    """
    _check(parts, formats, tolerance)
    report = progress or (lambda text, share: None)
    reference = _number(run({}))
    if not math.isfinite(reference):
        allowed = "a metric that is finite in the highest format"
        raise ConfigError(
            explain(f"a metric of {reference} in {formats[0]}", allowed, "Correct the metric or its input")
        )
    counted = [1]

    def error_of(assignment: Mapping[str, str]) -> float:
        counted[0] += 1
        value = _number(run({part: f for part, f in assignment.items() if f != formats[0]}))
        return abs(value - reference) / (abs(reference) or 1.0) if math.isfinite(value) else math.inf

    alone: dict[str, dict[str, float]] = {part: {} for part in parts}
    chosen: dict[str, str] = {}
    for done, part in enumerate(parts):
        report(f"{part} alone", done / len(parts))
        chosen[part] = formats[0]
        for lower in reversed(formats[1:]):
            alone[part][lower] = error_of({part: lower})
            if alone[part][lower] <= tolerance:
                chosen[part] = lower
                break
    report("all parts together", 1.0)
    error = error_of(chosen)
    while error > tolerance:
        lowered = [part for part in parts if chosen[part] != formats[0]]
        if not lowered:
            passed = f"a metric that differs by {error:.1e} with all parts in {formats[0]}"
            raise ConfigError(explain(passed, "a metric that is the same every time", "Seed what the run draws"))
        worst = max(lowered, key=lambda part: alone[part][chosen[part]])
        chosen[worst] = formats[formats.index(chosen[worst]) - 1]
        if chosen[worst] != formats[0] and chosen[worst] not in alone[worst]:
            alone[worst][chosen[worst]] = error_of({worst: chosen[worst]})
        error = error_of(chosen)
    return MetricReport(
        formats=chosen, reference=reference, error=error, tolerance=tolerance, alone=alone, runs=counted[0]
    )


def _check(parts: Sequence[str], formats: Sequence[str], tolerance: float) -> None:
    if not parts or len(set(parts)) < len(parts):
        raise ConfigError(explain(f"parts {list(parts)}", "one or more names that differ", "Name the parts"))
    if len(formats) < 2 or len(set(formats)) < len(formats):
        allowed = "two or more formats that differ, the highest first"
        raise ConfigError(explain(f"formats {list(formats)}", allowed, "Pass for example ('fp32', 'bf16')"))
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not (is_number and 0 < tolerance < math.inf):
        raise ConfigError(explain(f"tolerance={tolerance!r}", "a number above zero", "Pass for example 1e-3"))


def _number(metric: Any) -> float:
    """What a run returned as a number; `ConfigError` if it is none."""
    try:
        return float(metric)
    except (TypeError, ValueError, RuntimeError) as error:
        passed = f"a metric that is a {type(metric).__name__}"
        raise ConfigError(explain(passed, "a number, or a tensor of one", "Return one number")) from error


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
