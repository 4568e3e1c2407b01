"""The numbers of a run are those of its lines in force, whatever happened to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import batches, net, sgd

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.records.lines import to_plain
from deepseek_mp.report.summary import ScaleSummary, report_run

Record = Callable[..., Path]


def test_the_numbers_of_a_run(record: Record) -> None:
    lines = {2: {"scale": 8.0, "peak_memory_bytes": 100}, 3: {"scale": 4.0, "peak_memory_bytes": 50}}
    report = report_run(record(losses=(3.0, 0.5, 1.0), lines=lines))
    assert (len(report.steps), report.applied, report.first_loss, report.last_loss) == (3, 3, 3.0, 1.5)
    assert report.lowest_loss is not None
    assert (report.lowest_loss.step, report.lowest_loss.loss) == (2, 0.5)
    assert report.scale == ScaleSummary(first=1.0, last=4.0, low=1.0, high=8.0, changes=2)
    assert report.seconds_per_step is not None
    assert (report.seconds_per_step.count, report.seconds_per_step.median) == (2, pytest.approx(0.25))
    assert report.peak_memory_bytes == 100
    assert report.samples_per_second is None


def test_energy_counts_from_one_reading_to_the_next(record: Record) -> None:
    reading = {"peak_memory_bytes": 1}
    lines = {1: {**reading, "joules": None}, 17: {**reading, "joules": 32.0}, 33: {**reading, "joules": 64.0}}
    report = report_run(record(losses=[1.0] * 40, lines=lines))
    assert (report.joules, report.joules_steps, report.joules_per_step) == (96.0, 32, 3.0)
    assert report_run(record("other")).joules_per_step is None


def test_a_resumed_run(record: Record) -> None:
    record(losses=(3.0, 2.0, 9.0), ended=False)
    info = {"versions": {"torch": "2.11.0"}}
    report = report_run(record(losses=(1.5, 1.0), after=2, info=info))
    assert [step.loss for step in report.steps] == [3.0, 2.0, 1.5, 1.0]
    assert dict(report.attempt_steps) == {1: 2, 2: 2}
    assert ("versions.torch", "2.13.0", "2.11.0") in report.attempt_changes[2]
    assert report.seconds_per_step is not None
    assert report.seconds_per_step.count == 2  # without the first step of either attempt
    assert report.notes == (
        "1 line of steps that a later attempt made again: left out", "no plan is recorded", "no decision is recorded"
    )  # fmt: skip


def test_losses_that_are_not_finite(record: Record) -> None:
    skipped = {"status": "skipped", "reason": "the loss is nan", "first_bad_module": "fc"}
    report = report_run(record(losses=(2.0, math.nan, math.inf, 1.0), lines={2: skipped}))
    assert (report.applied, report.history.skipped[0].step) == (3, 2)
    assert report.last_loss == math.inf
    assert report.lowest_loss is not None
    assert report.lowest_loss.loss == 1.0
    assert "the loss is not finite in 2 steps" in report.notes
    json.dumps(to_plain(report.to_json(), "report"), allow_nan=False)


def test_a_run_without_steps(record: Record) -> None:
    report = report_run(record(losses=(), ended=False))
    assert (report.steps, report.last_loss, report.scale, report.seconds_per_step) == ((), None, None, None)
    assert "no step is recorded" in report.notes
    assert report.notes[-1].startswith("the last attempt did not end")
    assert report.to_json()["loss"]["curve"] == []


def test_torn_lines_and_missing_files(record: Record) -> None:
    path = record(plan=PrecisionPlan.of("bf16"))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 1, "st')
    (path / "decisions.jsonl").unlink()
    report = report_run(path)
    assert len(report.steps) == 3
    assert report.notes[0].startswith("1 line cut short")
    (path / "metrics.jsonl").unlink()
    assert report_run(path).steps == ()


def test_a_plan_of_a_later_release_costs_the_plan_only(record: Record) -> None:
    path = record(
        plan=PrecisionPlan.of("bf16"),
        decisions=[(0, Decision(layer="a", old="fp32", new="bf16", reason=Reason.PINNED))],
    )
    stored = json.loads((path / "plan.json").read_text())
    (path / "plan.json").write_text(json.dumps(stored | {"version": 9}))
    report = report_run(path)
    assert report.plan is None
    assert any("record version 9" in note for note in report.notes)
    assert len(report.layers.in_force) == 1


def test_another_record_version_is_refused(record: Record) -> None:
    path = record()
    stored = json.loads((path / "run.json").read_text())
    for version in (0, 2):
        (path / "run.json").write_text(json.dumps(stored | {"version": version}))
        with pytest.raises(ConfigError, match=f"of record version {version}.*release of deepseek-mp that wrote it"):
            report_run(path)


def test_alarms_and_storage_are_in_the_json(record: Record) -> None:
    alarm = {"layer": "a", "tensor": "input", "kind": "mass", "value": 0.5, "limit": 0.1}
    stored = {"layer": "a.weight", "kind": "storage", "old": "fp32", "new": "bf16_sr", "reason": "noise_small"}
    plain = report_run(record(decisions=[(2, stored)], lines={3: {"alarms": [alarm]}})).to_json()
    assert plain["alarms"] == [
        {"layer": "a", "tensor": "input", "kind": "mass", "times": 1, "first_step": 3, "largest": 0.5, "limit": 0.1}
    ]
    assert [(line["layer"], line["new"]) for line in plain["storage"]] == [("a.weight", "bf16_sr")]
    assert plain["compared"] == []


def test_a_run_of_the_trainer(tmp_path: Path) -> None:
    trainer = MixedPrecisionTrainer(
        net(), "bf16", loss_scale_policy=64.0, optimizer=sgd, device="cpu", emulate=True, run_dir=tmp_path, seed=5
    )
    trainer.fit(batches(5, bad={2}), epochs=2, val_loader=batches(1))
    report = report_run(tmp_path)
    assert (len(report.steps), report.applied) == (10, 8)
    assert {step.reason for step in report.history.skipped} == {"the loss is nan"}
    assert report.plan == trainer.plan
    assert [choice.layer for choice in report.layers.in_force] == [d.layer for d in trainer.plan.decisions]
    assert report.settings["config.seed"] == 5
    assert report.history.validation.keys() == {"val_loss"}
    assert report.seconds_per_step is not None
    assert report.samples_per_second is not None
