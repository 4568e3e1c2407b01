"""Two runs part where they were made to, and nowhere else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import batches, net, sgd

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.optim import AdamW
from deepseek_mp.precision import Decision, Reason
from deepseek_mp.precision.storage import StorageLimits
from deepseek_mp.records.lines import to_plain
from deepseek_mp.report.difference import compare_runs, numbers_of
from deepseek_mp.trainer.storage import WeightStorage

Record = Callable[..., Path]


def decision(layer: str, new: str, reason: Reason = Reason.REQUESTED) -> Decision:
    return Decision(layer=layer, old="fp32", new=new, reason=reason)


def test_a_run_and_itself(record: Record) -> None:
    path = record(decisions=[(0, decision("a", "bf16"))], lines={2: {"status": "skipped"}})
    found = compare_runs(path, path)
    assert (found.settings, found.layers, found.decisions_a, found.decisions_b, found.moved) == ((),) * 5
    assert (found.skipped_a, found.skipped_b) == ((), ())
    assert [(name, parting.compared, parting.unequal) for name, parting in found.series.items()] == [
        ("loss", 3, 0), ("grad_norm", 3, 0), ("scale", 3, 0)
    ]  # fmt: skip


def test_each_kind_of_difference(record: Record) -> None:
    a = record("a", decisions=[(0, decision("x", "bf16")), (0, decision("y", "bf16")), (0, decision("z", "bf16"))])
    b = record(
        "b",
        losses=(3.0, 2.0, 1.5, 1.0),
        info={"versions": {"torch": "2.11.0"}},
        decisions=[(0, decision("x", "fp32", Reason.PINNED)), (0, decision("y", "bf16")), (2, decision("z", "bf16"))],
        lines={2: {"status": "skipped"}, 3: {"scale": 2.0}},
    )
    found = compare_runs(a, b, tolerance=0.2)
    assert ("versions.torch", "2.13.0", "2.11.0") in found.settings
    assert {(d.layer, d.a, d.b) for d in found.layers} == {("x", "bf16", "fp32")}
    assert [(c.layer, c.new) for c in found.decisions_a] == [("x", "bf16")]
    assert [(c.layer, c.new) for c in found.decisions_b] == [("x", "fp32")]
    assert [(m.choice.layer, m.choice.step, m.step_b) for m in found.moved] == [("z", 0, 2)]
    loss = found.series["loss"]
    assert loss.first_beyond is not None
    assert (loss.first_beyond.step, loss.compared, loss.only_b) == (3, 3, 1)
    assert found.series["scale"].first_unequal is not None
    assert [step.step for step in found.skipped_b] == [2]
    assert found.skipped_a == ()


def alarm(layer: str) -> dict[str, Any]:
    return {"layer": layer, "tensor": "input", "kind": "mass", "value": 0.02, "limit": 0.005}


def rms(last: float) -> dict[str, Any]:
    return {"a": {"tensors": {"input": {"samples": 1, "spread": {"rms": {"last": last}}}}}}


def test_what_became_of_layers_is_compared_too(record: Record) -> None:
    stored = {**decision("w", "bf16_sr").to_json(), "kind": "storage"}
    compared = replace(decision("", "bf16", Reason.COMPARED), evidence={"budget_scale": 0.5})
    a = record("a", decisions=[(1, stored), (2, compared)], lines={2: {"alarms": [alarm("x")], "statistics": rms(1.0)}})
    b = record("b", lines={2: {"alarms": [alarm("x")]}, 3: {"alarms": [alarm("x")], "statistics": rms(3.0)}})
    found = compare_runs(a, b)
    assert [(d.parameter, *d.formats) for d in found.storage] == [("w", "bf16_sr", "(no decision)")]
    assert [(d.what, d.a and d.a.times, d.b and d.b.times) for d in found.alarms] == [(("x", "input", "mass"), 1, 2)]
    assert [(d.statistic, d.most[0].a, d.most[0].b) for d in found.statistics] == [("input rms", 1.0, 3.0)]
    assert found.without_statistics == ""
    assert [(c.reason, c.step) for c in found.decisions_a] == [("compared", 2)]
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["storage"][0]["a"]["new"] == "bf16_sr"
    assert plain["alarms"][0]["b"]["times"] == 2
    assert plain["statistics"][0]["most"][0]["layer"] == "a"
    assert plain["numbers"]["alarms"] == {"a": 1, "b": 2}
    assert plain["numbers"]["budget_scale"] == {"a": 0.5, "b": None}


@pytest.mark.parametrize(("lacks", "order"), [("B", ("with", "without")), ("A", ("without", "with"))])
def test_a_run_without_statistics_is_named(record: Record, lacks: str, order: tuple[str, str]) -> None:
    paths = {"with": record("with", lines={1: {"statistics": rms(1.0)}}), "without": record("without")}
    found = compare_runs(*(paths[name] for name in order))
    assert (found.without_statistics, found.statistics) == (lacks, ())


def test_numbers_stand_beside_each_other(record: Record) -> None:
    a = record("a", lines={1: {"peak_memory_bytes": 10}})
    b = record("b", losses=(1.0,), lines={1: {"peak_memory_bytes": 30}})
    found = compare_runs(a, b)
    numbers = {name: (in_a, in_b) for name, in_a, in_b in numbers_of(found.a, found.b)}
    assert numbers["steps"] == (3, 1)
    assert numbers["last_loss"] == (2.0, 1.0)
    assert numbers["peak_memory_bytes"] == (10, 30)
    assert numbers["joules_per_step"] == (None, None)


def test_json_of_runs_that_are_not_finite(record: Record) -> None:
    found = compare_runs(record("a"), record("b", losses=(3.0, math.nan)))
    plain = json.loads(json.dumps(to_plain(found.to_json(), "report"), allow_nan=False))
    assert plain["loss"]["first_beyond"] == {"step": 2, "a": 2.0, "b": "NaN", "relative": "Infinity"}
    assert plain["numbers"]["steps"] == {"a": 3, "b": 2}


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_is_a_number_from_zero(record: Record, tolerance: float) -> None:
    path = record()
    with pytest.raises(ConfigError, match=r"tolerance=.*finite number from 0"):
        compare_runs(path, path, tolerance=tolerance)


def test_the_error_names_the_run_that_is_none(record: Record, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere holds no"):
        compare_runs(record(), tmp_path / "nowhere")


def test_two_runs_of_the_trainer_that_differ_in_precision(tmp_path: Path) -> None:
    for mode in ("fp32", "bf16"):
        options = {"optimizer": sgd, "device": "cpu", "emulate": True, "seed": 0, "run_dir": tmp_path / mode}
        MixedPrecisionTrainer(net(), mode, **options).fit(batches())
    found = compare_runs(tmp_path / "fp32", tmp_path / "bf16")
    assert {name for name, _, _ in found.settings} == {"config.precision_mode", "plan.base"}
    assert {"0", "4"} <= {d.layer for d in found.layers}
    assert found.series["loss"].compared == 5
    assert found.series["loss"].first_unequal is not None
    assert found.series["loss"].first_beyond is None


def test_two_runs_of_the_trainer_that_differ_in_a_callback_and_in_what_it_did(tmp_path: Path) -> None:
    limits = StorageLimits(in_a_row=1)
    for name, callbacks in (("stored", [WeightStorage(every=1, limits=limits)]), ("plain", [])):
        options = {"optimizer": AdamW, "device": "cpu", "emulate": True, "seed": 0, "run_dir": tmp_path / name}
        MixedPrecisionTrainer(net(), "bf16", callbacks=callbacks, statistics_every=1, **options).fit(batches(8))
    found = compare_runs(tmp_path / "stored", tmp_path / "plain")
    assert {name for name, _, _ in found.settings} == {"callbacks.WeightStorage"}
    assert {d.parameter for d in found.storage} >= {"4.weight"}
    assert {d.formats[1] for d in found.storage} == {"(no decision)"}
    names = {d.statistic for d in found.statistics}
    assert {"input rms", "weight amax", "grad_output mass in_use", "update ratio", "input bad_values"} <= names
    assert any(d.beyond for d in found.statistics)
