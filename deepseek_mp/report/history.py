"""The lines of a run as typed values: its steps, its epochs, and operations that fell back to a wider format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_mp.records import Run

Fallbacks = Mapping[tuple[str, str, str], int]
"""(operation, format it ran in, reason) -> how often, on the steps that were counted."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of measurements; None for what the line does not say. Losses may be NaN or infinite.

    `seconds` is the time since the step before, `joules` the energy since the last line that has any.
    """

    attempt: int
    step: int
    status: str = "applied"
    reason: str = ""
    first_bad_module: str | None = None
    loss: float | None = None
    grad_norm: float | None = None
    scale: float | None = None
    lr: float | None = None
    seconds: float | None = None
    samples_per_second: float | None = None
    flop_utilisation: float | None = None
    peak_memory_bytes: float | None = None
    joules: float | None = None


NUMBERS = (
    "loss", "grad_norm", "scale", "lr", "seconds", "samples_per_second", "flop_utilisation", "peak_memory_bytes",
    "joules",
)  # fmt: skip
"""The fields of a step that are numbers, named as in the record."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What the lines in force of a run say, in order: one `Step` a step, one mapping an epoch."""

    steps: tuple[Step, ...]
    epochs: tuple[Mapping[str, Any], ...]
    fallbacks: Fallbacks

    @property
    def skipped(self) -> tuple[Step, ...]:
        """Steps that were not applied."""
        return tuple(step for step in self.steps if step.status != "applied")

    @property
    def validation(self) -> dict[str, float]:
        """The numbers of the last validation, by the names `val_...` they are recorded under."""
        last = self.epochs[-1] if self.epochs else {}
        found = {name: number(item) for name, item in last.items() if name.startswith("val_")}
        return {name: item for name, item in found.items() if item is not None}

    def series(self, value: Callable[[Step], float | None]) -> dict[int, float]:
        """Step number -> value, for the steps that have one."""
        return {step.step: found for step in self.steps if (found := value(step)) is not None}


def read_history(run: Run) -> History:
    """The lines in force of a run. A line of the user's own counts as a step if it has a loss or a status."""
    steps: dict[int, Step] = {}
    epochs = []
    for line in run.metrics:
        if line.get("status") == "epoch":
            epochs.append(line)
        elif "status" in line or "loss" in line:
            steps[line["step"]] = _step(line)
    ordered = tuple(steps[number] for number in sorted(steps))
    return History(steps=ordered, epochs=tuple(epochs), fallbacks=_fallbacks(run.metrics))


def number(value: object) -> float | None:
    """The value if it is a number, NaN and infinities included (None for all else)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None


def _step(line: Mapping[str, Any]) -> Step:
    module = line.get("first_bad_module")
    return Step(
        attempt=line["attempt"],
        step=line["step"],
        status=str(line.get("status", "applied")),
        reason=str(line.get("reason", "")),
        first_bad_module=None if module is None else str(module),
        **{name: number(line.get(name)) for name in NUMBERS},
    )


def _fallbacks(lines: Iterable[Mapping[str, Any]]) -> Fallbacks:
    """Counts of all lines that hold a report of the monitor, as its `Usage.to_json` writes it."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for line in lines:
        found = line.get("fallbacks")
        for entry in found if isinstance(found, list) else ():
            if isinstance(entry, Mapping):
                key = (str(entry.get("op", "")), str(entry.get("format", "")), str(entry.get("reason", "")))
                counts[key] += int(number(entry.get("count")) or 0)
    return dict(counts.most_common())
