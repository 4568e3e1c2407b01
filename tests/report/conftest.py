"""Run directories written by hand, small enough that every number in a report can be counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepseek_mp.precision import Decision, PrecisionPlan
from deepseek_mp.records import RunWriter

INFO = {
    "versions": {"deepseek_mp": "0.1.0", "torch": "2.13.0"},
    "device": {"torch": "cpu", "device_name": "a CPU", "notes": ["of no interest"]},
    "config": {"precision_mode": "bf16", "seed": 0, "compile": False, "ema_decay": None},
    "model": "Net",
    "parameters": 1234567,
}


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes an attempt of the run NAME with one step for each loss; returns its directory."""
    writers = []

    def write(
        name: str = "run",
        losses: Iterable[float] = (3.0, 2.0, 1.0),
        *,
        after: int = 0,
        info: Mapping[str, Any] = INFO,
        plan: PrecisionPlan | None = None,
        decisions: Iterable[tuple[int, Decision | Mapping[str, Any]]] = (),
        lines: Mapping[int, Mapping[str, Any]] | None = None,
        ended: bool = True,
    ) -> Path:
        path = tmp_path / name
        writer = RunWriter(path, info=info, resume_step=after)
        writers.append(writer)
        if plan is not None:
            writer.plan(plan)
        for step, decision in decisions:
            writer.decision(decision, step=step)
        for step, loss in enumerate(losses, after + 1):
            fields = {"status": "applied", "loss": loss, "scale": 1.0, "grad_norm": 2 * loss, "seconds": 0.1 * step}
            writer.metrics(step=step, **fields | dict((lines or {}).get(step, {})))
        if ended:
            writer.close()
        return path

    yield write
    for writer in writers:
        writer.close()
