"""What the benchmarks share: interleaved timing, statistics, the machine's description, the JSON report.

Contenders are timed in one process in turn (A B A B ...), several steps at a time, and every other
round in reverse order, so that a machine that warms up, cools down or is shared slows all of them
alike. A comparison is the median of the ratios within each round, not the ratio of two medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from deepseek_mp.backends import default_device, synchronize
from deepseek_mp.workloads.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number measured in several rounds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0], rounds=1)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(
            median=round(statistics.median(values), 4), low=round(low, 4), high=round(high, 4), rounds=len(values)
        )

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g}-{self.high:.4g})"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to time, and the settings it runs under, entered once per block."""

    call: Callable[[], object]
    settings: Callable[[], AbstractContextManager[object]] = nullcontext


def interleave(
    contenders: Mapping[str, Contender], device: torch.device, *, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds per call of each contender, one number per round.

    Each contender must be warmed up before. A block is `steps` calls; the device's queue is empty
    at both of its ends.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            contender = contenders[name]
            with contender.settings():
                synchronize(device)
                start = time.perf_counter()
                for _ in range(steps):
                    contender.call()
                synchronize(device)
                times[name].append((time.perf_counter() - start) * 1e3 / steps)
    return times


def laps(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Milliseconds of each of `count` calls issued one after the other, by events on the device's own queue.

    A call that waits for the host to launch its kernels is timed as training sees it. On a CPU, the host's clock.
    """
    event = None if device.type == "cpu" else getattr(torch.get_device_module(device), "Event", None)
    if event is None:
        stamps = [time.perf_counter()]
        for _ in range(count):
            call()
            synchronize(device)
            stamps.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in pairwise(stamps)]
    marks = [event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    synchronize(device)
    return [float(start.elapsed_time(end)) for start, end in pairwise(marks)]


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> Spread:
    """The spread of time(over) / time(under) within each round."""
    return Spread.of([a / b for a, b in zip(times[over], times[under], strict=True)])


def agree(ours: float, theirs: float, tolerance: float) -> bool:
    """Both are finite and differ by at most `tolerance`, relative to theirs."""
    return math.isfinite(ours) and math.isfinite(theirs) and abs(ours - theirs) <= tolerance * abs(theirs)


@dataclass
class Report:
    """The results of one benchmark script: the machine, and one entry per case."""

    benchmark: str
    device: torch.device
    arguments: Mapping[str, Any]
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add what `measure` returns; a case that fails is recorded, printed, and does not stop the others."""
        print(f"{self.benchmark}: {name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            result = measure()
        except Exception as error:  # noqa: BLE001 - one case must not cost the others their device time
            traceback.print_exc()
            result = {"check": "failed", "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.perf_counter() - start, 1)
        self.cases[name] = json.loads(json.dumps(result, default=_plain))
        gc.collect()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()

    def write(self, path: Path | None) -> Path:
        """Write the JSON; the default name is made of the benchmark's and the device's."""
        machine = describe_machine(self.device)
        place = path or RESULTS / f"{self.benchmark}-{slug(machine['device_name'])}.json"
        content = {
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine,
            "commit": commit(),
            "arguments": self.arguments,
            "spread": "low and high are the quartiles of the rounds; times in ms per step",
            "cases": self.cases,
        }
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
        return place

    def finish(self, path: Path | None, rows: Sequence[Sequence[str]]) -> int:
        """Write, print the table and the failures, and give the exit status: 1 if a check failed."""
        print_table(rows)
        failed = {name: case for name, case in self.cases.items() if case.get("check") != "passed"}
        for name, case in failed.items():
            print(f"NOT PASSED {name}: {case.get('error') or case.get('check')}")
        print(f"written: {self.write(path)}")
        return 1 if failed else 0


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length in aligned columns; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def arguments(description: str, cases: Sequence[str], *, rounds: int = 12) -> argparse.Namespace:
    """The options every benchmark has, read from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=cases, metavar="CASE", help=f"some of: {', '.join(cases)}")
    parser.add_argument("--rounds", type=positive, default=rounds, help="rounds of A B A B (default %(default)s)")
    parser.add_argument("--steps", type=positive, help="steps in a block (default: the case's own)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="compiled modes too, where the benchmark has them")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/NAME-DEVICE.json)")
    return parser.parse_args()


def slug(name: str) -> str:
    """A name as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or platform.machine()


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def commit() -> str | None:
    """The commit that is measured; where the code was copied without its history, COMMIT names it."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        command = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or not a checkout: the report then has no commit
