"""Storages in checkpoints of the trainer."""

import pytest
import torch
from small_runs import batches, make
from torch import nn

from deepseek_mp.errors import CheckpointError
from deepseek_mp.optim import AdamW, set_storage
from deepseek_mp.precision.storage import StorageFormat


def build(mode="bf16", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return make(mode, model, optimizer=lambda params: AdamW(params, lr=1e-2), **options)


def stored(run):
    return [run.optimizer.storage(parameter).value for parameter in run.model.parameters()]


@pytest.fixture
def saved(tmp_path):
    """A run with two BF16 weights, saved in the middle of a window."""
    run = build(gradient_accumulation_steps=2)
    set_storage(run.optimizer, run.model[0].weight, "bf16_sr")
    set_storage(run.optimizer, run.model[2].weight, "bf16_kahan")
    for batch in batches(3):
        run.step(batch)
    run.save(tmp_path)
    return run, tmp_path


def test_a_run_built_in_fp32_takes_over_the_storages(saved):
    run, path = saved
    again = build(gradient_accumulation_steps=2)
    again.load(path)
    assert stored(again) == ["bf16_sr", "fp32", "bf16_kahan", "fp32"]
    for both in (run, again):
        for batch in batches(5):
            both.step(batch)
    for one, two in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    weight, other = run.model[2].weight, again.model[2].weight
    lacking = run.optimizer.state[weight]["compensation"]
    assert torch.equal(lacking, again.optimizer.state[other]["compensation"])


def test_a_run_in_another_precision_stores_in_fp32_what_it_reads_so(saved):
    run, path = saved
    again = build("fp32", gradient_accumulation_steps=2)
    again.load(path)
    assert stored(again) == ["fp32"] * 4
    assert torch.equal(again.model[0].weight, run.model[0].weight.float())
    again.step(batches(1)[0])


def test_weights_go_back_to_fp32_with_an_older_checkpoint(tmp_path):
    run = build()
    run.step(batches(1)[0])
    run.save(tmp_path)
    kept = run.model[0].weight.detach().clone()
    set_storage(run.optimizer, run.model[0].weight, "bf16_sr")
    run.load(tmp_path)
    assert run.optimizer.storage(run.model[0].weight) is StorageFormat.FP32
    assert torch.equal(run.model[0].weight, kept)


def test_another_optimizer_refuses_the_checkpoint(saved):
    other = make("bf16", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), optimizer=torch.optim.AdamW)
    with pytest.raises(CheckpointError, match=r"0\.weight .*bfloat16, but the one here has .*float32"):
        other.load(saved[1])
    assert other.model[0].weight.dtype is torch.float32


@pytest.mark.parametrize("states", ["8bit", "fp32"])
def test_moments_in_blocks_are_saved_and_go_on(states, tmp_path):
    """With the same bits; a run with FP32 moments takes them over as numbers."""

    def wide(states):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 1200), nn.ReLU(), nn.Linear(1200, 3))
        return make("bf16", model, optimizer=lambda params: AdamW(params, lr=1e-2, states=states))

    run, again = wide("8bit"), wide(states)
    for batch in batches(3):
        run.step(batch)
    run.save(tmp_path)
    again.load(tmp_path)
    for both in (run, again):
        for batch in batches(2):
            both.step(batch)
    kept = again.optimizer.state[again.model[0].weight]
    assert ("exp_avg_codes" in kept) == (states == "8bit")
    for one, two in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two) if states == "8bit" else (one - two).abs().mean() < 1e-3
