"""Times the units of a model in every candidate, the largest first, within a fixed time.

A row of the table is one `UnitCall` timed in all candidates; a row that is not complete is left out,
so that the candidates' sums always compare the same work. Coverage says how much of the model's
multiply-adds the rows hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deepseek_mp.costs.cache import CostCache
from deepseek_mp.costs.decide import Candidate
from deepseek_mp.costs.timing import Timing
from deepseek_mp.costs.units import UnitCall, measure_unit, takes
from deepseek_mp.precision import RECIPES
from deepseek_mp.precision.planning import PAYS

MEASURE_S = 0.02
"""Time for one unit in one candidate, beyond the first three calls."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One kind of call, timed in every candidate."""

    call: UnitCall
    times: Mapping[Candidate, Timing]


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """The rows measured and the share of multiply-adds they hold.

    `errors` are candidates in which a unit raised an error; `untimed` layers raised one in the first
    candidate already, where the model itself runs: they cannot be timed alone.
    """

    rows: tuple[LayerRow, ...] = ()
    coverage: float = 0.0
    errors: Mapping[Candidate, str] = field(default_factory=dict)
    untimed: Mapping[str, str] = field(default_factory=dict)

    def total_ms(self, candidate: Candidate) -> float | None:
        """The sum over all calls of the rows; None where nothing was timed."""
        if not self.rows or any(candidate not in row.times for row in self.rows):
            return None
        return sum(row.times[candidate].median_ms * len(row.call.names) for row in self.rows)

    def mixed(self, scaled: Candidate, plain: Candidate, *, output: str | None) -> tuple[Candidate, float] | None:
        """The scaled candidate for the layers it pays in, and the sum over all calls; None if there is none.

        `output` is the layer that a plan keeps out of a scaled recipe anyway.
        """
        total = self.total_ms(plain)
        if total is None:
            return None
        paying, kept = set(), set()
        for row in self.rows:
            if scaled not in row.times:
                continue
            gain = row.times[plain].median_ms - row.times[scaled].median_ms
            names = [name for name in row.call.names if name != output]
            if row.times[scaled].median_ms * PAYS < row.times[plain].median_ms:
                paying.update(names)
                total -= gain * len(names)
            else:
                kept.update(names)
        return (replace(scaled, kept=frozenset(kept)), total) if paying else None

    def of_layers(self, *, host: bool = True) -> dict[str, dict[str, float]]:
        """Milliseconds by layer and candidate, over all calls of that layer in one step.

        Without `host` those of the device alone, where they could be had.
        """
        layers: dict[str, dict[str, float]] = {}
        for row in self.rows:
            for name in row.call.names:
                sums = layers.setdefault(name, {})
                for candidate, timing in row.times.items():
                    ms = timing.median_ms if host else timing.without_host_ms
                    sums[candidate.key] = sums.get(candidate.key, 0.0) + ms
        return layers


def measure_layers(
    calls: Sequence[UnitCall],
    candidates: Sequence[Candidate],
    *,
    device: torch.device,
    budget_s: float,
    cache: CostCache,
    environment: Mapping[str, Any],
    kernels: str | None = None,
    exclude: Callable[[str], bool] = lambda name: False,
    progress: Callable[[float], None] = lambda fraction: None,
    clock: Callable[[], float] = time.perf_counter,
) -> LayerTimes:
    """Time the calls in every candidate until `budget_s` is used; cached timings cost nothing.

    `exclude` names layers that no candidate changes (pinned ones): they count as not covered. An
    error in the first candidate leaves the row out; any other candidate it rules out.
    """
    table = _Table(device=device, cache=cache, environment={**environment, "kernels": kernels})
    total = sum(call.total_macs for call in calls)
    started = clock()
    for done, call in enumerate(sorted(calls, key=lambda call: -call.total_macs)):
        names = tuple(name for name in call.names if not exclude(name))
        late = clock() - started >= budget_s
        if names and call.plain and not (late and table.is_missing(call, candidates)):
            table.add(call, names, candidates)
        progress(max(done / len(calls), min(1.0, (clock() - started) / max(budget_s, 1e-9))))
    return table.result(total)


class _Table:
    """The rows measured so far."""

    def __init__(self, *, device: torch.device, cache: CostCache, environment: Mapping[str, Any]) -> None:
        self._device = device
        self._cache = cache
        self._environment = environment
        self._rows: list[tuple[UnitCall, tuple[str, ...], dict[Candidate, Timing]]] = []
        self._errors: dict[Candidate, str] = {}
        self._untimed: dict[str, str] = {}

    def is_missing(self, call: UnitCall, candidates: Sequence[Candidate]) -> bool:
        """Whether a timing of the row is not in the cache."""
        concerned = [candidate for candidate in candidates if _concerns(call, candidate)]
        return any(self._cache.get(self._key(call, candidate)) is None for candidate in concerned)

    def add(self, call: UnitCall, names: tuple[str, ...], candidates: Sequence[Candidate]) -> None:
        """Time the row; it is left out where memory was short or the unit does not run alone."""
        times: dict[Candidate, Timing] = {}
        for candidate in candidates:
            if candidate in self._errors or not _concerns(call, candidate):
                continue
            try:
                timing = self._timed(call, candidate)
            except Exception as error:  # noqa: BLE001 - kept: evidence says what could not be timed, and why
                message = f"{type(error).__name__}: {error}"
                if candidate == candidates[0]:
                    self._untimed[call.names[0]] = message
                    return
                self._errors[candidate] = message
                continue
            if timing is None:
                return
            times[candidate] = timing
        self._rows.append((call, names, times))

    def result(self, total_macs: int) -> LayerTimes:
        rows = tuple(
            LayerRow(
                call=replace(call, names=names),
                times={c: timing for c, timing in times.items() if c not in self._errors},
            )
            for call, names, times in self._rows
        )
        timed = sum(row.call.total_macs for row in rows)
        coverage = timed / total_macs if total_macs else 0.0
        return LayerTimes(rows=rows, coverage=coverage, errors=self._errors, untimed=self._untimed)

    def _timed(self, call: UnitCall, candidate: Candidate) -> Timing | None:
        """The cached timing, or a new one."""
        key = self._key(call, candidate)
        known = self._cache.get(key)
        if known is not None:
            try:
                return Timing.from_json(known)
            except (KeyError, TypeError, ValueError):
                self._cache.discard(key)
        layout = candidate.memory_format if call.has_layout else "contiguous"
        kernels = self._environment["kernels"]
        timing = measure_unit(call, candidate.format, layout, self._device, MEASURE_S, kernels=kernels)
        if timing is not None:
            self._cache.put(key, timing.to_json())
        return timing

    def _key(self, call: UnitCall, candidate: Candidate) -> dict[str, Any]:
        layout = candidate.memory_format if call.has_layout else "contiguous"
        unit = {"unit": call.signature, "format": candidate.format, "memory_format": layout, "search": False}
        return {**self._environment, **unit}


def _concerns(call: UnitCall, candidate: Candidate) -> bool:
    """Whether the call is to be timed in the candidate: units that cannot take a scaled recipe are not."""
    return RECIPES[candidate.format].is_plain or takes(call, candidate.format)
