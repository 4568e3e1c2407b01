"""Lines of a record become steps, epochs and fallbacks, also where the user wrote them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from deepseek_mp.records import RunWriter, read_run
from deepseek_mp.report.history import Step, number, read_history


def test_steps_and_epochs_are_told_apart(record: Callable[..., Path]) -> None:
    path = record(lines={2: {"status": "skipped", "reason": "the loss is nan", "first_bad_module": "fc"}})
    with RunWriter(path, info={}, resume_step=3) as writer:
        writer.metrics(step=3, status="epoch", epoch=0, loss=2.0, val_loss=1.5, val_name="text")
    history = read_history(read_run(path))
    assert [step.step for step in history.steps] == [1, 2, 3]
    assert history.steps[0] == Step(attempt=1, step=1, loss=3.0, scale=1.0, grad_norm=6.0, seconds=0.1)
    assert [(s.step, s.status, s.reason, s.first_bad_module) for s in history.skipped] == [
        (2, "skipped", "the loss is nan", "fc")
    ]
    assert history.validation == {"val_loss": 1.5}
    assert history.series(lambda step: step.loss) == {1: 3.0, 2: 2.0, 3: 1.0}


def test_lines_of_a_loop_of_one_s_own(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={}) as writer:
        writer.metrics(step=1, loss=2.0)
        writer.metrics(step=1, accuracy=0.5)
        writer.metrics(step=2, loss=math.nan, grad_norm="large", lr=True)
    history = read_history(read_run(tmp_path))
    assert [step.step for step in history.steps] == [1, 2]
    second = history.steps[1]
    assert math.isnan(second.loss or 0.0)
    assert (second.status, second.grad_norm, second.lr) == ("applied", None, None)
    assert history.validation == {}


def test_fallbacks_are_summed_over_the_reports_of_the_monitor(tmp_path: Path) -> None:
    softmax = {
        "layer": "a",
        "op": "softmax",
        "phase": "forward",
        "format": "fp32",
        "reason": "autocast_list",
        "count": 2,
    }
    with RunWriter(tmp_path, info={}) as writer:
        for step in (1, 2):
            more = [softmax, {**softmax, "layer": "b"}, {**softmax, "op": "sum", "count": 1}, "torn"]
            writer.metrics(step=step, fallbacks=more)
    history = read_history(read_run(tmp_path))
    assert history.fallbacks == {("softmax", "fp32", "autocast_list"): 8, ("sum", "fp32", "autocast_list"): 2}
    assert history.steps == ()


def test_numbers() -> None:
    assert (number(1), number(2.5), number(True), number("1"), number(None)) == (1.0, 2.5, None, None, None)
    assert number(10**400) is None
