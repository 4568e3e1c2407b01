"""Weights stored in BF16 in whole runs: every recipe that reads them, decisions while training, and what is refused."""

import json
import logging

import pytest
import torch
from small_runs import batches, make, sgd
from torch import nn

from deepseek_mp.errors import ConfigError, PlanError
from deepseek_mp.optim import AdamW, set_storage
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.precision.storage import StorageDecision, StorageFormat, StorageLimits, StorageReason
from deepseek_mp.records import read_run
from deepseek_mp.report.layers import read_layers
from deepseek_mp.trainer.storage import WeightStorage, change_precision

INPUTS = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS[:, :16] * 0.5
AT_ONCE = StorageLimits(in_a_row=1)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 16))


def adamw(params):
    return AdamW(params, lr=1e-2)


def trainer(mode="bf16", model=None, **options):
    options = {"loss_fn": nn.MSELoss(), "optimizer": adamw, "loss_scale_policy": 64.0, **options}
    return make(mode, mlp() if model is None else model, **options)


def losses(run, steps):
    return [run.step((INPUTS, TARGETS)).loss for _ in range(steps)]


def weights(run):
    return [module.weight for module in run.model if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("storage", ["bf16_sr", "bf16_kahan"])
@pytest.mark.parametrize("mode", ["bf16", "row", "mx", "delayed", "nvfp4"])
def test_every_recipe_in_a_bf16_region_reads_bf16_weights(mode, storage):
    run, exact = trainer(mode, gradient_accumulation_steps=2, max_grad_norm=1.0), trainer(mode)
    losses(run, 2)
    for weight in weights(run):
        set_storage(run.optimizer, weight, storage)
    found = losses(run, 40)
    assert all(weight.dtype is torch.bfloat16 for weight in weights(run))
    assert found[-1] < 0.5 * found[0]
    assert found[-1] == pytest.approx(losses(exact, 21)[-1], rel=0.2)


@pytest.mark.parametrize("storage", ["bf16_sr", "bf16_kahan"])
def test_live_precision_takes_weights_along_out_of_bf16(storage, monkeypatch):
    run, recorded = trainer("bf16"), []
    monkeypatch.setattr(run.recorder, "decided", recorded.extend)
    losses(run, 2)
    first, last = weights(run)
    for weight in (first, last):
        set_storage(run.optimizer, weight, storage)
    held = first.float() + run.optimizer.state[first].get("compensation", 0)
    change_precision(run, PrecisionPlan.of("bf16", pin={"0": "fp32"}))
    assert run.plan.recipe_for("0").name == "fp32"
    (made,) = [one for one in recorded if isinstance(one, StorageDecision)]
    assert (made.layer, made.old.value, made.new.value) == ("0.weight", storage, "fp32")
    assert (first.dtype, last.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(first.data, held, rtol=0, atol=0)
    found = losses(run, 20)
    assert found[-1] < found[0]


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_layers_that_do_not_run_in_bf16_refuse_them(mode):
    run = trainer("bf16")
    losses(run, 1)
    set_storage(run.optimizer, weights(run)[0], "bf16_kahan")
    plan = run.plan
    with pytest.raises(PlanError, match=rf"'0.weight' is stored in bf16_kahan and its unit runs in {mode}"):
        run.change_plan(mode)
    assert run.plan is plan
    set_storage(run.optimizer, weights(run)[0], "fp32")
    run.change_plan(mode)
    losses(run, 1)


def test_a_skipped_step_leaves_bf16_weights_and_their_state():
    run = trainer("bf16", model=nn.Linear(4, 3), loss_fn=None)
    good, bad = batches(2, bad=[1])
    weight = run.model.weight
    set_storage(run.optimizer, weight, "bf16_sr")
    run.step(good)
    before = weight.detach().clone(), run.optimizer.state[weight]["step"].item()
    assert run.step(bad).status == "skipped"
    assert torch.equal(weight, before[0])
    assert run.optimizer.state[weight]["step"].item() == before[1]


def test_storage_follows_the_learning_rate():
    """As the rate falls so do updates, and weights go from stochastic rounding to compensation to FP32."""
    storage = WeightStorage(every=1, limits=AT_ONCE)
    run = trainer("bf16", callbacks=[storage])
    seen = []
    for rate in (1e-2, 1e-5, 1e-7):
        run.optimizer.param_groups[0]["lr"] = rate
        losses(run, 4)
        seen.append([run.optimizer.storage(weight) for weight in weights(run)])
    assert seen == [[StorageFormat.BF16_SR] * 2, [StorageFormat.BF16_KAHAN] * 2, [StorageFormat.FP32] * 2]
    assert {decision.layer for decision in storage.decisions} == {"0.weight", "3.weight"}
    assert storage.latest["1.weight"].reason is StorageReason.KIND_KEPT
    assert storage.decisions[-1].evidence["policy"] == "auto"


def test_decisions_are_in_the_records_of_the_run_with_their_evidence(tmp_path):
    storage = WeightStorage(every=1, limits=AT_ONCE)
    run = trainer("bf16", callbacks=[storage], run_dir=tmp_path)
    run.fit([(INPUTS, TARGETS)] * 4, epochs=1)
    found = read_run(tmp_path)
    lines = [line for line in found.decisions if line.get("kind") == "storage"]
    assert [(line["step"], line["layer"], line["old"], line["new"]) for line in lines] == [
        (2, "0.weight", "fp32", "bf16_sr"), (2, "3.weight", "fp32", "bf16_sr"),
    ]  # fmt: skip
    assert lines[0]["reason"] == "noise_small"
    assert lines[0]["evidence"] == dict(storage.decisions[0].evidence)
    assert lines[0]["evidence"]["psi"] < 20
    assert {choice.layer for choice in read_layers(found).in_force} == {"0", "1", "3"}
    assert [(choice.layer, choice.new) for choice in read_layers(found).storage] == [
        ("0.weight", "bf16_sr"), ("3.weight", "bf16_sr")
    ]  # fmt: skip
    assert found.info["callbacks"] == {"WeightStorage": json.loads(json.dumps(storage.recorded_settings()))}
    assert found.info["callbacks"]["WeightStorage"] == {
        "every": 1,
        "policy": "auto",
        "noise_fraction": 1.0,
        "limits": {
            "psi": 20.0,
            "edq_error": 0.05,
            "small_ratio": 1e-3,
            "in_a_row": 1,
            "kept_kinds": ["norm", "bias", "embedding"],
        },
    }


def test_a_smaller_format_waits_for_three_measurements():
    storage = WeightStorage(every=2)
    run = trainer("bf16", callbacks=[storage])
    losses(run, 6)
    assert storage.latest["0.weight"].reason is StorageReason.WAITING
    losses(run, 1)
    assert run.optimizer.storage(weights(run)[0]) is StorageFormat.BF16_SR


def test_layers_that_do_not_run_in_bf16_stay_in_fp32():
    storage = WeightStorage(every=1, limits=AT_ONCE)
    losses(trainer("bf16", callbacks=[storage], pin={"3": "fp32"}), 3)
    assert storage.latest["3.weight"].reason is StorageReason.READ_IN_FP32
    assert storage.latest["0.weight"].new is StorageFormat.BF16_SR


def test_a_skipped_step_is_measured_again():
    storage = WeightStorage(every=2, limits=AT_ONCE)
    run = trainer("bf16", callbacks=[storage])
    losses(run, 2)
    assert run.step((INPUTS * torch.nan, TARGETS)).status == "skipped"
    assert not storage.latest
    losses(run, 1)
    assert storage.latest["0.weight"].new is StorageFormat.BF16_SR


@pytest.mark.parametrize("saved_at", [8, 9])  # between a measurement and the next; before the step that is measured
def test_a_resumed_run_has_the_same_bits_and_decisions(tmp_path, saved_at):
    def build():
        storage = WeightStorage(every=3)
        return trainer("bf16", callbacks=[storage], ema_decay=0.9), storage

    loader = [(INPUTS, TARGETS)] * 20
    (whole, decided), (first, _), (second, again) = build(), build(), build()
    whole.fit(loader, epochs=1)
    first.fit(loader, epochs=1, max_steps=saved_at)
    first.save(tmp_path)
    second.fit(loader, epochs=1, resume=tmp_path)
    assert [decision.new for decision in decided.decisions] == [StorageFormat.BF16_SR] * 2
    assert again.decisions == decided.decisions
    for one, two in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert one.dtype is two.dtype
        assert torch.equal(one, two)


def test_what_was_stored_is_said_at_the_end(caplog):
    run = trainer("bf16", callbacks=[WeightStorage(every=1, limits=AT_ONCE)])
    with caplog.at_level(logging.INFO, "deepseek_mp"):
        run.fit([(INPUTS, TARGETS)] * 4, epochs=1)
    assert "weights are stored as 6% fp32, 94% bf16_sr" in caplog.text


def test_refuses_other_optimizers_and_arguments_out_of_range():
    run = trainer("bf16", optimizer=sgd, callbacks=[WeightStorage()])
    with pytest.raises(ConfigError, match=r"WeightStorage with the optimizer SGD.*deepseek_mp\.optim"):
        run.fit([(INPUTS, TARGETS)], epochs=1)
    with pytest.raises(ConfigError, match="every=0"):
        WeightStorage(every=0)
    with pytest.raises(ConfigError, match="noise_fraction=2"):
        WeightStorage(noise_fraction=2)
    with pytest.raises(ConfigError, match="unknown policy 'best'"):
        WeightStorage(policy="best")


@pytest.mark.parametrize("mode", ["bf16", "row"])
@pytest.mark.parametrize("storage", ["bf16_sr", "bf16_kahan"])
def test_a_step_of_one_batch_holds_half_the_gradient_and_moves_alike(mode, storage, monkeypatch):
    runs, dtypes = [], []
    for wide in (False, True):
        if wide:
            monkeypatch.setattr("deepseek_mp.trainer.step.take_gradients", lambda *_, **__: None)
        run = trainer(mode, max_grad_norm=0.5)
        for weight in weights(run):
            set_storage(run.optimizer, weight, storage)
        weights(run)[0].register_post_accumulate_grad_hook(lambda weight: dtypes.append(weight.grad.dtype))
        runs.append((run, losses(run, 8)))
    assert dtypes == [torch.bfloat16] * 8 + [torch.float32] * 8
    (one, found), (two, expected) = runs
    assert found == expected
    for ours, theirs in zip(weights(one), weights(two), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_of_several_batches_add_up_in_fp32():
    run = trainer("bf16", gradient_accumulation_steps=2)
    for weight in weights(run):
        set_storage(run.optimizer, weight, "bf16_sr")
    run.step((INPUTS, TARGETS))
    assert {weight.grad.dtype for weight in weights(run)} == {torch.float32}
    single = trainer("bf16")
    for weight in weights(single):
        set_storage(single.optimizer, weight, "bf16_sr")
    single.step((INPUTS, TARGETS), close=False)
    assert {weight.grad.dtype for weight in weights(single)} == {torch.float32}


@pytest.mark.parametrize("wrong", [{"every": "5"}, {"every": 2.5}, {"every": True}, {"noise_fraction": "1"}])
def test_numbers_of_another_type_are_refused(wrong):
    with pytest.raises(ConfigError, match="every a whole number from 1"):
        WeightStorage(**wrong)


def test_limits_of_another_type_are_refused():
    with pytest.raises(ConfigError, match="a StorageLimits"):
        WeightStorage(limits={"in_a_row": 1})
