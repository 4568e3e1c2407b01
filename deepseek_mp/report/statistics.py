"""Statistics of layers as medians over a run, and the layers in which those of two runs differ most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deepseek_mp.records import Run
from deepseek_mp.report.history import number
from deepseek_mp.report.parting import relative
from deepseek_mp.report.spread import Spread, spread

MOST = 5
"""Layers that are kept of a statistic: those that differ most."""
SMALL = 0.01
"""Differences count beside this part of the statistic's largest median: a share of 1e-9 in place of 0 is none."""

IN_USE = "in_use"
"""How the record calls the format that a layer runs in; errors of other formats are those that one asked about."""

Spreads = Mapping[str, Mapping[str, Spread]]
"""Statistic -> layer -> median and spread over the samples of a run."""
Reading = tuple[str, Any, float]
"""Statistic, what tells its sample from others of the layer, value."""


@dataclass(frozen=True, kw_only=True)
class LayerPair:
    """The medians of one statistic of one layer in two runs."""

    layer: str
    a: float
    b: float
    apart: float
    """|b - a| over their size and their scatter together, from 0 to 2. Size is the larger magnitude, or `SMALL` of the
    largest of any layer; scatter is the width that 80 % of a run's samples lie in, of the run in which it is wider."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "relative": relative(self.a, self.b)}


@dataclass(frozen=True, kw_only=True)
class StatisticDifference:
    """One statistic over the layers for which both runs have it."""

    statistic: str
    """'input rms', 'update ratio'; errors of rounding with the format: 'weight mass in_use', 'weight mass fp8_e4m3'."""
    is_asked: bool
    """Whether it is about a format that one asked about, and not about what ran."""
    compared: int
    """Layers."""
    beyond: int
    """Those that are further apart than the tolerance."""
    most: tuple[LayerPair, ...]
    """The at most `MOST` layers that are furthest apart, if they are at all."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "most": [pair.to_json() for pair in self.most]}


def read_spreads(run: Run) -> Spreads:
    """Medians and spreads over the samples in the lines in force of a run. Values that are not finite are left out.

    A line has the latest sample of each layer, which may be that of the line before: each counts once. Of counts
    (`non_finite`, `produced`: 'input bad_values', 'forward bad_values_made') it is the number at the end of the run.
    """
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    counts: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    seen: dict[tuple[str, str], tuple[int, Any]] = {}
    for line in run.metrics:
        for layer, about in _mapping(line.get("statistics")).items():
            for statistic, sample, found in _samples(_mapping(about)):
                at = (line["attempt"], sample)
                if sample is None or seen.get((statistic, layer)) != at:
                    values[statistic, layer].append(found)
                seen[statistic, layer] = at
            for statistic, found in _counts(_mapping(about)):
                counts[statistic, layer][line["attempt"]] = found  # each attempt counts from 0
    spreads: dict[str, dict[str, Spread]] = defaultdict(dict)
    totals = {key: [sum(by_attempt.values())] for key, by_attempt in counts.items()}
    for (statistic, layer), some in {**values, **totals}.items():
        over_run = spread(some)
        if over_run is not None:
            spreads[statistic][layer] = over_run
    return spreads


def compare_statistics(a: Spreads, b: Spreads, tolerance: float) -> tuple[StatisticDifference, ...]:
    """The statistics that both runs have, of what ran before those that one asked about, furthest apart first."""
    found = [_compare(name, a[name], b[name], tolerance) for name in a if a[name].keys() & b.get(name, {}).keys()]
    return tuple(sorted(found, key=lambda one: (one.is_asked, -max((pair.apart for pair in one.most), default=0.0))))


def _compare(name: str, a: Mapping[str, Spread], b: Mapping[str, Spread], tolerance: float) -> StatisticDifference:
    shared = [layer for layer in a if layer in b]
    floor = SMALL * max(abs(run[layer].median) for layer in shared for run in (a, b))
    pairs = [
        LayerPair(layer=layer, a=a[layer].median, b=b[layer].median, apart=_apart(a[layer], b[layer], floor))
        for layer in shared
    ]
    ordered = sorted((pair for pair in pairs if pair.apart), key=lambda pair: -pair.apart)
    return StatisticDifference(
        statistic=name,
        is_asked=len(name.split()) == 3 and not name.endswith(f" {IN_USE}"),
        compared=len(shared),
        beyond=sum(pair.apart > tolerance for pair in pairs),
        most=tuple(ordered[:MOST]),
    )


def _apart(a: Spread, b: Spread, floor: float) -> float:
    if a.median == b.median:
        return 0.0
    size, scatter = max(abs(a.median), abs(b.median), floor), max(a.high - a.low, b.high - b.low)
    return abs(b.median - a.median) / (size + scatter)


def _samples(about: Mapping[str, Any]) -> Iterator[Reading]:
    """The values of a layer's latest samples, as `LayerStatistics.to_json` of the monitor writes them."""
    for name, tensor in _mapping(about.get("tensors")).items():
        sample = _mapping(tensor).get("samples")
        for field, value in _mapping(_mapping(tensor).get("spread")).items():
            yield from _reading(f"{name} {field}", sample, value)
        for way, fields in _mapping(_mapping(tensor).get("errors")).items():
            for field, value in _mapping(fields).items():
                yield from _reading(f"{name} {field} {way}", sample, value)
    for field, value in _mapping(about.get("update")).items():
        yield from _reading(f"update {field}", about.get("updates"), value)


def _reading(statistic: str, sample: Any, value: Any) -> Iterator[Reading]:
    last = number(_mapping(value).get("last"))
    if last is not None:
        yield statistic, sample, last


def _counts(about: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for group, name in (("non_finite", "{} bad_values"), ("produced", "{} bad_values_made")):
        for where, count in _mapping(about.get(group)).items():
            found = number(count)
            if found is not None:
                yield name.format(where), found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
