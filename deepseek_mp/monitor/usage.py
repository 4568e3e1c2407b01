"""What ran, as one report: operations by format, layer and phase, and the fallbacks with their reasons.

A `Usage` holds everything counted between two calls of `log_precision_usage`. Counts are of the
sampled steps and are never scaled up; `sampled_steps` of `steps` says how many those were. Printed, it
is a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepseek_mp.monitor.alarms import Alarm
from deepseek_mp.monitor.counts import CAST, Count, Fallback, OpCount
from deepseek_mp.monitor.layer_statistics import LayerStatistics
from deepseek_mp.monitor.statistics_table import statistics_table
from deepseek_mp.monitor.table import columns, few
from deepseek_mp.precision import FORMATS

Cells = dict[str, Count]
"""Format -> count."""
WHOLE = "(model)"
"""How a table names the layer '': the model's own forward, and the loss."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One report of the monitor.

    `steps` are calls of the model with gradients on, `eval_steps` without; the sampled ones are
    those that were counted. `compiled_counted_eagerly` says that parts of the model are compiled
    and ran uncompiled on the sampled steps, so that their operations could be seen.
    """

    steps: int
    sampled_steps: int
    eval_steps: int
    sampled_eval_steps: int
    compiled_counted_eagerly: bool
    counts: tuple[OpCount, ...]
    fallbacks: tuple[Fallback, ...]
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)
    """By layer, over the whole life of the monitor: unlike counts they do not start again with each report."""
    alarms: tuple[Alarm, ...] = ()
    """Those raised since the last report."""

    @property
    def ops(self) -> dict[str, Cells]:
        """Operation -> format -> count, over all layers."""
        return _nested(((row.op, row.format, row.count) for row in self.counts), by_name=False)

    @property
    def formats(self) -> Cells:
        """Format -> count, over all layers and operations; conversions are left out."""
        rows = (("", row.format, row.count) for row in self.counts if row.op != CAST)
        return _nested(rows, by_name=True).get("", {})

    @property
    def layers(self) -> dict[str, dict[str, Cells]]:
        """Layer -> operation -> format -> count, layers in the order they first ran."""
        grouped: dict[str, list[tuple[str, str, Count]]] = {}
        for row in self.counts:
            grouped.setdefault(row.layer, []).append((row.op, row.format, row.count))
        return {layer: _nested(rows, by_name=False) for layer, rows in grouped.items()}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "steps": self.steps,
            "sampled_steps": self.sampled_steps,
            "eval_steps": self.eval_steps,
            "sampled_eval_steps": self.sampled_eval_steps,
            "compiled_counted_eagerly": self.compiled_counted_eagerly,
            "ops": _counts_to_json(self.ops),
            "layers": {layer: _counts_to_json(ops) for layer, ops in self.layers.items()},
            "fallbacks": [fallback.to_json() for fallback in self.fallbacks],
            "notes": list(self.notes),
            "statistics": {name: layer.to_json() for name, layer in self.statistics.items()},
            "alarms": [alarm.to_json() for alarm in self.alarms],
        }

    def __str__(self) -> str:
        return render(self)


def _nested(rows: Iterable[tuple[str, str, Count]], *, by_name: bool) -> dict[str, Cells]:
    """Sum rows of (outer, inner, count); the outer keys by name, or the most frequent first."""
    nested: dict[str, Cells] = {}
    totals: Counter[str] = Counter()
    for outer, inner, count in rows:
        cell = nested.setdefault(outer, {})
        cell[inner] = cell.get(inner, Count()) + count
        totals[outer] += count.total
    order = sorted(nested, key=lambda name: name if by_name else (-totals[name], name))
    return {outer: dict(sorted(nested[outer].items())) for outer in order}


def _counts_to_json(ops: dict[str, Cells]) -> dict[str, dict[str, dict[str, int]]]:
    return {op: {format: count.to_json() for format, count in cells.items()} for op, cells in ops.items()}


def render(usage: Usage, *, layers: int = 30) -> str:
    """The report as text, at most `layers` rows by layer; in the cells, forward + backward.

    All numbers above the statistics are counts of operations on the sampled steps.
    """
    parts = [_title(usage)]
    if usage.counts:
        parts += [_operations(usage), _by_layer(usage, layers), _fallbacks(usage.fallbacks)]
    parts.append(statistics_table(usage.statistics, layers))
    parts += [f"alarm: {alarm}" for alarm in usage.alarms]
    parts += [f"note: {note}" for note in usage.notes]
    return "\n\n".join(part for part in parts if part)


def _title(usage: Usage) -> str:
    sampled = f"{usage.sampled_steps} of {usage.steps} steps sampled"
    if usage.eval_steps:
        sampled += f", {usage.sampled_eval_steps} of {usage.eval_steps} calls without gradients"
    compiled = "; compiled parts ran uncompiled on them" if usage.compiled_counted_eagerly else ""
    return f"Precision usage: {sampled}{compiled}. Counts: forward + backward."


def _operations(usage: Usage) -> str:
    ops = usage.ops
    casts = ops.pop(CAST, {})
    total = ("all", usage.formats)
    lines = _grid("operation", [*ops.items(), total], _ordered(usage.formats))
    if casts:
        shown = sorted(casts.items(), key=lambda cast: -cast[1].total)
        lines += ["", *columns([("cast", "count"), *((format, _cell(count)) for format, count in shown)])]
    return "\n".join(lines)


def _by_layer(usage: Usage, limit: int) -> str:
    rows: list[tuple[str, Cells]] = []
    for layer, ops in usage.layers.items():
        formats: Cells = {}
        for cells in (cells for op, cells in ops.items() if op != CAST):
            for format, count in cells.items():
                formats[format] = formats.get(format, Count()) + count
        if formats:
            rows.append((layer or WHOLE, formats))
    rows.sort(key=lambda row: row[0] == WHOLE)
    lines = _grid("layer", rows[:limit], _ordered(usage.formats))
    if len(rows) > limit:
        lines.append(f"... and {len(rows) - limit} more layers")
    return "\n".join(lines)


def _fallbacks(fallbacks: Sequence[Fallback]) -> str:
    if not fallbacks:
        return ""
    merged: dict[tuple[str, str, str], tuple[Count, list[str]]] = {}
    for fallback in fallbacks:
        key = (fallback.op, fallback.format, fallback.reason.value)
        count, layers = merged.get(key, (Count(), []))
        here = Count(**{fallback.phase: fallback.count})
        name = fallback.layer or WHOLE
        merged[key] = (count + here, layers if name in layers else [*layers, name])
    rows = [("fallback", "format", "reason", "count", "layers")]
    for (op, format, reason), (count, layers) in sorted(merged.items(), key=lambda item: -item[1][0].total):
        rows.append((op, format, reason, _cell(count), few(layers)))
    return "\n".join(columns(rows))


def _grid(title: str, rows: Iterable[tuple[str, Cells]], formats: Sequence[str]) -> list[str]:
    """Rows of counts with one column per format."""
    cells = [(name, *(_cell(counts.get(format)) for format in formats)) for name, counts in rows]
    return columns([(title, *formats), *cells])


def _cell(count: Count | None) -> str:
    return "." if count is None else f"{count.forward} + {count.backward}"


def _ordered(formats: Iterable[str]) -> list[str]:
    """Narrow formats first, then names that are not formats."""
    return sorted(formats, key=lambda name: (FORMATS[name].bits if name in FORMATS else 1000, name))
