"""The report of what was done for memory: in words, and as JSON."""

from __future__ import annotations

import json
import math

import pytest

from deepseek_mp.controller.memory_choice import Chosen, Measure, Trial, Weighed
from deepseek_mp.errors import ConfigError
from deepseek_mp.trainer.memory_report import GIB, MemoryLine, MemoryReport, in_gib, limit_of, lines_of


def test_the_limit_is_the_number_or_most_of_what_there_is() -> None:
    assert limit_of(2.5, None) == 2.5 * GIB
    assert limit_of("auto", 100 * GIB) == 95 * GIB
    with pytest.raises(ConfigError, match=r"memory='auto' on a device that does not say what it has.*number of GiB"):
        limit_of("auto", None)


@pytest.mark.parametrize(
    ("count", "text"), [(3 * GIB, "3 GiB"), (GIB // 2, "0.5 GiB"), (5 << 20, "5 MiB"), (-5 << 20, "-5 MiB")]
)
def test_bytes_are_said_in_the_unit_that_suits(count: int, text: str) -> None:
    assert in_gib(count) == text


def weighed(name: str, saved: int | None, extra: float | None, cost: float, after: str = "") -> Weighed:
    measure = Measure(name=name, exact=True, by_batch=True, after=after)
    return Weighed(measure=measure, saved_bytes=saved, extra_seconds=extra, cost=cost)


def test_of_steps_along_one_way_the_furthest_is_taken_with_what_they_save_together() -> None:
    some = weighed("budget=0.5", 2 * GIB, 0.1, 0.05 / GIB)
    more = weighed("budget=0.25", GIB, 0.2, 0.2 / GIB, after="budget=0.5")
    other, last = weighed("other", 3 * GIB, 0.0, 0.0), weighed("last", None, None, math.inf)
    chosen = Chosen(taken=(some.measure, more.measure), trial=Trial(peak_bytes=1), fits=True, needless=(other.measure,))
    lines = lines_of((other, some, more, last), chosen, {"activations": "refused"})
    assert [(line.name, line.taken) for line in lines] == [
        ("budget=0.25", True), ("other", False), ("last", False), ("activations", False),
    ]  # fmt: skip
    assert str(lines[0]) == "taken budget=0.25: 200 ms for each GiB; alone 3 GiB less and +300 ms"
    assert str(lines[1]) == "left other: the step fits without it; alone 3 GiB less and +0 ms"
    more = MemoryLine(name="a", taken=False, why="no", saved_bytes=-GIB, extra_seconds=-0.002)
    assert str(more) == "left a: no; alone 1 GiB more and -2 ms"
    assert str(lines[2]) == "left last: others that cost less for each byte suffice"
    assert str(lines[3]) == "left activations: refused"


def report() -> MemoryReport:
    lines = (
        MemoryLine(name="a", taken=True, why="costs no time that can be measured", saved_bytes=GIB, extra_seconds=0.0),
        MemoryLine(name="b", taken=False, why="it was set by hand"),
    )
    return MemoryReport(
        limit_bytes=4 * GIB, before_bytes=5 * GIB, after_bytes=3 * GIB, slowdown=1.25, samples=8, timed_samples=4,
        lines=lines,
    )  # fmt: skip


def test_it_reads_back_equal() -> None:
    found = MemoryReport.from_json(json.loads(json.dumps(report().to_json(), allow_nan=False)))
    assert found == report()
    assert found.taken == ("a",)


def test_it_says_the_outcome_and_a_line_for_each_measure() -> None:
    first, *rest = str(report()).splitlines()
    assert first == "a step holds 3 GiB of 4 GiB with a; as it was, 5 GiB, and 1.25 times the time"
    assert [line.split(":")[0] for line in rest] == ["  taken a", "  left b"]
    fitting = MemoryReport(limit_bytes=4 * GIB, before_bytes=GIB, after_bytes=GIB)
    assert str(fitting) == "a step holds 1 GiB of 4 GiB; nothing had to be done"
