"""The alarms that a run raised, by layer, tensor and statistic, and where those of two runs part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_mp.records import Run
from deepseek_mp.report.history import number


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """All alarms of a run about one statistic of one tensor of a layer."""

    layer: str
    tensor: str
    """'input', 'weight', 'grad_output' or 'update'; for values that are not finite 'output' or 'grad_input'."""
    kind: str
    """The statistic that went beyond its limit, as in `monitor.Limits`."""
    times: int
    first_step: int
    """The step whose line has the first of them: what was sampled arrives some steps after."""
    largest: float | None
    limit: float | None
    """Of the largest value; None, as for `largest`, where no line says."""

    @property
    def what(self) -> tuple[str, str, str]:
        return self.layer, self.tensor, self.kind

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class AlarmDifference:
    """Alarms that two runs did not raise alike: in one of them only, not as often, or at another step first."""

    a: Alarms | None
    b: Alarms | None

    @property
    def what(self) -> tuple[str, str, str]:
        found = self.a or self.b
        assert found is not None
        return found.what

    def to_json(self) -> dict[str, Any]:
        layer, tensor, kind = self.what
        a, b = (None if run is None else run.to_json() for run in (self.a, self.b))
        return {"layer": layer, "tensor": tensor, "kind": kind, "a": a, "b": b}


def read_alarms(run: Run) -> tuple[Alarms, ...]:
    """The alarms in the lines in force of a run, in the order in which they came first."""
    found: dict[tuple[str, str, str], Alarms] = {}
    for step, alarm in _lines(run.metrics):
        layer, tensor, kind = (str(alarm.get(name, "")) for name in ("layer", "tensor", "kind"))
        now, limit = number(alarm.get("value")), number(alarm.get("limit"))
        before = found.get((layer, tensor, kind))
        if before is not None and not _is_larger(now, before.largest):
            now, limit = before.largest, before.limit
        found[layer, tensor, kind] = Alarms(
            layer=layer,
            tensor=tensor,
            kind=kind,
            times=1 if before is None else before.times + 1,
            first_step=step if before is None else before.first_step,
            largest=now,
            limit=limit,
        )
    return tuple(found.values())


def compare_alarms(a: Sequence[Alarms], b: Sequence[Alarms]) -> tuple[AlarmDifference, ...]:
    """Where the alarms of two runs part, in the order of the runs."""
    here, there = ({alarms.what: alarms for alarms in run} for run in (a, b))
    pairs = [AlarmDifference(a=here.get(what), b=there.get(what)) for what in dict.fromkeys([*here, *there])]
    return tuple(
        pair
        for pair in pairs
        if pair.a is None or pair.b is None or (pair.a.times, pair.a.first_step) != (pair.b.times, pair.b.first_step)
    )


def _lines(metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line in metrics:
        alarms = line.get("alarms")
        for alarm in alarms if isinstance(alarms, list) else ():
            if isinstance(alarm, Mapping):
                yield line["step"], alarm


def _is_larger(now: float | None, before: float | None) -> bool:
    return now is not None and (before is None or now > before)
