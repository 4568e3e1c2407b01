"""What a run writes down: attempts, lines in force, sums of an epoch, and nothing before the first step."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.records import read_run
from deepseek_mp.trainer import recording
from deepseek_mp.trainer.recording import Recorder, describe
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.trainer.window import Window


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def make(mode="fp32", **options):
    return MixedPrecisionTrainer(net(), mode, device="cpu", emulate=True, **options)


def batches(count=3, bad=()):
    inputs = torch.randn(4 * count, 4, generator=torch.Generator().manual_seed(1))
    made = list(zip(inputs.split(4), inputs[:, :2].argmax(dim=1).split(4), strict=True))
    for index in bad:
        made[index][0].fill_(math.nan)
    return made


def steps(run):
    return [line for line in run.metrics if line["status"] != "epoch"]


def test_nothing_is_written_before_the_first_step(tmp_path):
    trainer = make(run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    trainer.fit(batches(1))
    assert (tmp_path / "run" / "run.json").exists()


def test_a_run_directory_tells_the_whole_run(tmp_path):
    trainer = make("bf16", run_dir=tmp_path, pin={"2": "fp32"}, max_grad_norm=1.0, seed=3)
    trainer.fit(batches(), 2, val_loader=batches(1), metrics={"ones": lambda output, target: 1.0})
    run = read_run(tmp_path)
    assert [(a.attempt, a.resume_step, a.outcome) for a in run.attempts] == [(1, 0, "completed")]
    assert [line["step"] for line in steps(run)] == [line["applied"] for line in steps(run)] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps(run)] == [0, 0, 0, 1, 1, 1]
    for line in steps(run):
        assert line["status"] == "applied"
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["lr"] == 1e-3
        assert line["seconds"] > 0
        assert line["samples_per_second"] > 0
        assert "reason" not in line
    epochs = [line for line in run.metrics if line["status"] == "epoch"]
    assert [(line["step"], line["epoch"], line["val_ones"]) for line in epochs] == [(3, 0, 1.0), (6, 1, 1.0)]
    assert epochs[0]["loss"] == pytest.approx(sum(line["loss"] for line in steps(run)[:3]) / 3)
    assert {(line["layer"], line["new"], line["reason"]) for line in run.decisions} == {
        ("0", "bf16", trainer.plan.decisions[0].reason.value), ("2", "fp32", trainer.plan.decisions[1].reason.value)
    }  # fmt: skip
    assert run.plan == trainer.plan.to_json()
    assert (tmp_path / "checkpoints" / "step-00000006").is_dir()


def test_a_decision_is_written_once_and_again_when_its_layer_came_back(tmp_path):
    trainer = make("bf16", run_dir=tmp_path)
    for pin in ({}, {"0": "fp32"}, {"0": "fp32"}, {}):
        trainer.change_plan("bf16", pin=pin)
        trainer.step(batches(1)[0])
    trainer.close()
    found = [(line["step"], line["layer"], line["new"]) for line in read_run(tmp_path).decisions]
    assert [line for line in found if line[1] == "0"] == [(0, "0", "bf16"), (1, "0", "fp32"), (3, "0", "bf16")]
    assert [step for step, layer, _ in found if layer == "2"] == [0]


def test_the_first_line_names_what_ran_on_what(tmp_path):
    make("bf16", run_dir=tmp_path, pin={"2": "fp32"}, seed=3).fit(batches(1))
    info = read_run(tmp_path).info
    assert info["versions"]["torch"] == torch.__version__
    assert info["device"]["torch"] == "cpu"
    assert info["device"]["device_name"]
    assert info["config"]["precision_mode"] == "bf16"
    assert info["config"]["pin"] == {"2": "fp32"}
    assert info["config"]["seed"] == 3
    assert (info["optimizer"], info["model"], info["parameters"]) == ("AdamW", "Sequential", 4 * 8 + 8 + 8 * 2 + 2)


def test_a_plan_as_the_mode_is_described_as_json():
    trainer = make()
    mode = MixedPrecisionTrainer(net(), trainer.plan, device="cpu").config.precision_mode
    described = describe(MixedPrecisionTrainer(net(), mode, device="cpu"))
    assert described["config"]["precision_mode"] == mode.to_json()
    json.dumps(described)


def test_skipped_steps_say_why_and_where(tmp_path):
    make(run_dir=tmp_path).fit(batches(3, bad=[1]))
    run = read_run(tmp_path)
    lines = steps(run)
    assert [(line["step"], line["applied"], line["status"]) for line in lines] == [
        (1, 1, "applied"), (2, 1, "skipped"), (3, 2, "applied")
    ]  # fmt: skip
    assert lines[1]["reason"] == "the loss is nan"
    assert lines[1]["first_bad_module"] == "(batch)"
    assert math.isnan(lines[1]["loss"])
    assert run.metrics[-1]["skipped"] == 1
    assert run.metrics[-1]["loss"] == pytest.approx((lines[0]["loss"] + lines[2]["loss"]) / 2)


def test_a_resumed_attempt_keeps_the_lines_before_it_and_replaces_those_after(tmp_path):
    first = make(run_dir=tmp_path)
    first.fit(batches(), 1)
    first.fit(batches(), 3, max_steps=8)
    second = make(run_dir=tmp_path)
    second.fit(batches(), 3, resume=tmp_path / "checkpoints" / "step-00000006")
    run = read_run(tmp_path)
    assert [(a.resume_step, a.outcome) for a in run.attempts] == [(0, "completed"), (3, "completed"), (6, "completed")]
    assert [line["step"] for line in steps(run)] == list(range(1, 10))
    assert [line["attempt"] for line in steps(run)] == [1] * 3 + [2] * 3 + [3] * 3
    assert [line["step"] for line in run.superseded_metrics] == [7, 8]


def test_a_fresh_run_in_the_same_place_replaces_all_lines(tmp_path):
    make(run_dir=tmp_path).fit(batches(3))
    shutil.rmtree(tmp_path / "checkpoints")  # with them it would be refused
    make(run_dir=tmp_path).fit(batches(2))
    run = read_run(tmp_path)
    assert [line["step"] for line in steps(run)] == [1, 2]
    assert len(run.superseded_metrics) == 4


def test_an_attempt_that_failed_says_with_what(tmp_path):
    def broken():
        yield batches(1)[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        make(run_dir=tmp_path).fit(broken())
    assert [a.outcome for a in read_run(tmp_path).attempts] == ["failed: OSError"]


def test_a_fit_that_ended_names_its_checkpoint_if_there_is_one(tmp_path, caplog):
    def broken():
        yield from batches(2)
        raise OSError("disk gone")

    for options, how in (({}, ""), ({"checkpoint_every": 1}, f"; continue .* with resume='{tmp_path}'")):
        caplog.clear()
        with pytest.raises(OSError, match="disk gone"):
            make(run_dir=tmp_path, **options).fit(broken())
        (said,) = [record.getMessage() for record in caplog.records if "fit ended" in record.getMessage()]
        assert re.fullmatch(f"fit ended by OSError after 2 steps{how}", said)


@pytest.mark.parametrize("kind", ["file", "below a file", "not ours", "other version", "not a path"])
def test_a_run_directory_that_cannot_be_one_is_refused_at_once(tmp_path, monkeypatch, kind):
    below = tmp_path / "run" / "first"
    place = {"file": tmp_path / "run", "below a file": below, "not a path": 5}.get(kind, tmp_path)
    if "file" in kind:
        (tmp_path / "run").write_text("something else")
    elif kind == "not ours":
        monkeypatch.setattr(recording.os, "access", lambda path, mode: False)
    elif kind == "other version":
        (tmp_path / "run.json").write_text('{"format": "deepseek_mp run", "version": 99, "attempts": []}')
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    model = net()
    messages = {
        "file": r"run_dir .*run is a file",
        "below a file": r"run_dir .*first, where .*run is a file",
        "not ours": r"run_dir .*, where .* cannot be written to",
        "other version": "record version 99",
        "not a path": "run_dir=5",
    }
    with pytest.raises(ConfigError, match=rf"{messages[kind]}.*Allowed"):
        MixedPrecisionTrainer(model, "bf16", device="cpu", emulate=True, run_dir=place)
    assert type(model[0]) is nn.Linear
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_memory_is_read_once_in_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "COUNTERS_EVERY", 4)
    joules = iter([10.0, 13.5])
    monkeypatch.setattr(recording.backends, "energy_joules", lambda device: next(joules, None))
    make(run_dir=tmp_path).fit(batches(6))
    lines = steps(read_run(tmp_path))
    assert [line["step"] for line in lines if "peak_memory_bytes" in line] == [1, 5]
    assert lines[0]["peak_memory_bytes"] is None or lines[0]["peak_memory_bytes"] > 0
    assert [lines[0]["joules"], lines[4]["joules"]] == [None, 3.5]


def test_flop_utilisation_is_told_where_the_peak_is_known(tmp_path):
    trainer = make(run_dir=tmp_path, monitor_every=2)
    object.__setattr__(trainer, "capabilities", Peak(trainer.capabilities))
    trainer.fit(batches(4))
    lines = steps(read_run(tmp_path))
    work = 2 * 4 * (4 * 8 + 8 * 2) + 2 * 4 * (4 * 8 + 2 * 8 * 2)  # forward, and backward without the first input's
    for line in lines:
        assert line["flop_utilisation"] == pytest.approx(work / (line["seconds"] * 1e12))


def test_statistics_are_written_every_so_often_and_at_the_end_of_a_fit(tmp_path):
    make(run_dir=tmp_path, monitor_every=3, statistics_every=2).fit(batches(4), 2)
    run = read_run(tmp_path)
    with_statistics = [(line["step"], line["status"]) for line in run.metrics if "statistics" in line]
    assert with_statistics == [(3, "applied"), (6, "applied"), (8, "epoch")]
    layer = run.metrics[-1]["statistics"]["0"]
    assert layer["recipe"] == "fp32"
    assert layer["updates"] >= 4  # on every second of eight steps, and where operations were counted
    assert layer["tensors"]["input"]["errors"]["fp8_e4m3"]["relative"]["mean"] > 0
    assert not any("alarms" in line for line in run.metrics)


def test_without_sampling_there_are_no_statistics(tmp_path):
    trainer = make(run_dir=tmp_path, monitor_every=1, statistics_every=None)
    trainer.fit(batches(2))
    assert not any("statistics" in line for line in read_run(tmp_path).metrics)
    assert trainer.monitor.statistics() == {}


class Fails(nn.Module):
    """Makes NaN of finite numbers in some of its calls."""

    def __init__(self, *bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, x):
        self.calls += self.training
        return x * math.nan if self.calls in self.bad else x


def test_alarms_are_written_with_the_step_after(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), Fails(2, 3, 4, 5), nn.Linear(8, 2))  # two steps, each of which is run again
    options = {"device": "cpu", "run_dir": tmp_path, "statistics_every": 1}
    trainer = MixedPrecisionTrainer(model, "fp32", loss_fn=lambda y, t: y.sum(), **options)
    trainer.fit(batches(6))
    lines = steps(read_run(tmp_path))
    alarms = {line["step"]: line["alarms"] for line in lines if "alarms" in line}
    assert [alarm["kind"] for found in alarms.values() for alarm in found] == ["non_finite"]
    (step, (alarm,)) = next(iter(alarms.items()))
    assert (alarm["layer"], alarm["tensor"]) == ("1", "output")
    assert alarm["step"] < step
    assert len(trainer.monitor.alarms) == 1


class Peak:
    """Capabilities with a peak of one TFLOP/s in fp32."""

    def __init__(self, found):
        self.found, self.peak_tflops = found, {"fp32": 1.0}

    def __getattr__(self, name):
        return getattr(self.found, name)


# -- sums --------------------------------------------------------------------------------------------------------


def recorder_after(*outcomes, run_dir=None):
    recorder = Recorder(run_dir, make())
    for status, loss in outcomes:
        recorder.step(StepFacts(status=status, loss=loss), Window(samples=4))
    return recorder


def test_an_epoch_is_summed_over_applied_steps():
    recorder = recorder_after(("applied", 1.0), ("skipped", math.nan), ("applied", 2.0), ("no_grads", 9.0))
    summary = recorder.epoch_summary()
    assert (summary["loss"], summary["skipped"]) == (1.5, 1)
    assert summary["samples_per_second"] == pytest.approx(16 / summary["seconds"])
    assert recorder.running_loss == 2.0


def test_an_epoch_without_an_applied_step_has_no_loss():
    assert math.isnan(recorder_after(("skipped", 1.0)).epoch_summary()["loss"])
    empty = recorder_after().epoch_summary()
    assert (empty["seconds"], empty["samples_per_second"]) == (0.0, None)


def test_a_continued_epoch_keeps_its_sums_and_a_new_one_begins_at_zero():
    recorder = recorder_after(("applied", 1.0))
    recorder.start_epoch(continued=True)
    assert recorder.epoch_summary()["loss"] == 1.0
    recorder.start_epoch(continued=False)
    assert math.isnan(recorder.epoch_summary()["loss"])


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make()
    trainer.fit(batches(), val_loader=batches(1))
    assert list(tmp_path.iterdir()) == []
    assert trainer.history[0]["loss"] > 0


def test_a_choice_that_was_there_before_is_written_when_it_comes_back(tmp_path):
    trainer = make("bf16", run_dir=tmp_path)
    for pin in ({}, {"0": "bf16"}, {}):
        trainer.change_plan("bf16", pin=pin)
        trainer.step(batches(1)[0])
    trainer.close()
    found = [line["reason"] for line in read_run(tmp_path).decisions if line["layer"] == "0"]
    assert found == ["requested", "pinned", "requested"]


def test_an_attempt_begins_with_the_plan_that_is_in_force(tmp_path):
    trainer = make("bf16", run_dir=tmp_path / "run")
    trainer.step(batches(1)[0])
    trainer.save(tmp_path / "point")
    trainer.change_plan("bf16", pin={"0": "fp32"})
    trainer.step(batches(1)[0])
    trainer.close()
    trainer.load(tmp_path / "point")
    trainer.step(batches(1)[0])
    trainer.close()
    in_force = [line for line in read_run(tmp_path / "run").decisions if line["layer"] == "0"]
    assert in_force[-1]["new"] == trainer.plan.decisions[0].new
