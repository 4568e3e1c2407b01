"""A budget for what an eager model keeps: blocks are computed again, and nothing else is different."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, find_batch_size
from deepseek_mp.activations import ActivationSettings
from deepseek_mp.activations.block_state import BlockState
from deepseek_mp.activations.record import SavedReason
from deepseek_mp.errors import ConfigError
from deepseek_mp.nn.again import is_computed_again
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.precision import PrecisionPlan, Reason
from deepseek_mp.trainer import planning, replay, step

LEAST = 0.01
"""Out of reach: every block is taken."""
INPUTS = torch.randn(12, 8, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(5, (12, 8), generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    def __init__(self, width: int, drop: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        hidden = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x + self.drop(self.down(nn.functional.gelu(self.up(hidden))))


class Net(nn.Module):
    def __init__(self, drop: float = 0.2, *, tied: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(32, drop) for _ in range(4)])
        self.head = nn.Linear(32, 5)
        if tied:
            self.blocks[2].up.weight = self.blocks[0].up.weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(output, target):
    return nn.functional.cross_entropy(output.flatten(0, 1).float(), target.flatten())


def make(mode="fp32", *, model=None, tied=False, **options):
    torch.manual_seed(0)
    model = Net(tied=tied) if model is None else model
    options = {"loss_fn": loss_fn, "seed": 0, "device": "cpu", "emulate": True, "progress": False} | options
    return MixedPrecisionTrainer(model, mode, **options)


def batches(count=6):
    return [(INPUTS[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2]) for i in range(count)]


def trained(mode="fp32", steps=4, **options):
    trainer = make(mode, **options)
    for batch in batches(steps):
        trainer.step(batch)
    trainer.settle()
    return trainer


def assert_same(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16", "delayed", "row"])
def test_training_is_the_same_bit_for_bit(mode):
    plain, budgeted = trained(mode), trained(mode, activation_memory_budget=LEAST)
    assert len(budgeted.recomputed_blocks.recomputed) == 4
    assert_same(plain, budgeted)
    assert torch.equal(torch.get_rng_state(), _rng_after(mode))
    for ours, theirs in zip(scales_of(plain.model), scales_of(budgeted.model), strict=True):
        assert torch.equal(ours.history, theirs.history)


def _rng_after(mode):
    trained(mode)
    return torch.get_rng_state()


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"tied": True}, {"ema_decay": 0.9}])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "delayed"])
def test_training_is_the_same_with(options, mode):
    assert_same(trained(mode, **options), trained(mode, **options, activation_memory_budget=LEAST))


class CountingBlock(Block):
    """Its numbers follow from how often it ran."""

    def __init__(self, width: int, drop: float = 0.2) -> None:
        super().__init__(width, drop)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls / 100)


def test_blocks_are_measured_without_being_counted():
    def counting():
        torch.manual_seed(0)
        model = Net()
        model.blocks = nn.ModuleList([CountingBlock(32) for _ in range(3)])
        return model

    within = trained(model=counting(), activation_memory_budget=LEAST)
    assert len(within.recomputed_blocks.recomputed) == 3
    assert_same(trained(model=counting()), within)


def test_it_keeps_to_the_budget_and_says_so():
    trainer = trained(steps=1, activation_memory_budget=0.6)
    choice = trainer.recomputed_blocks
    assert choice.is_within
    assert 0 < len(choice.recomputed) < 4
    assert choice.bytes_after <= 0.6 * choice.bytes_before
    assert all(block.bytes_freed > 0 and block.forward_ms > 0 for block in choice.blocks)


def test_saved_bytes_are_those_that_were_promised():
    trainer = trained(steps=1, activation_memory_budget=0.6)
    kept = []
    choice, real = trainer.recomputed_blocks, trainer.stepper.compute
    held = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.state_dict().values()}

    def counted(call):
        def pack(x):
            if x.untyped_storage().data_ptr() not in held:
                kept.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return real(call)

    trainer.stepper.compute = counted
    trainer.step(batches()[1])
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    loss = 2 * 8 * 5 * 4  # of the log-softmax, which is not the model's
    assert sum(storages.values()) == pytest.approx(choice.bytes_after, abs=loss + 1024)


def test_a_budget_of_everything_computes_nothing_again():
    trainer = trained(steps=1, activation_memory_budget=1.0)
    assert trainer.recomputed_blocks.recomputed == ()


def test_there_is_no_choice_before_a_step_or_without_a_budget():
    assert make(activation_memory_budget=0.5).recomputed_blocks is None
    assert trained(steps=1).recomputed_blocks is None


def test_decisions_say_what_was_found(tmp_path):
    trainer = make(activation_memory_budget=LEAST)
    said = []
    trainer.recorder.decided = said.extend
    trainer.step(batches()[0])
    reasons = {decision.layer: decision.reason for decision in said}
    assert reasons == {"": Reason.NOT_RECOMPUTED} | {f"blocks.{i}": Reason.RECOMPUTED for i in range(4)}
    assert "all that frees any" in said[0].detail
    assert said[0].evidence["bytes_after"] == trainer.recomputed_blocks.bytes_after


def test_a_model_without_repeated_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"on a model without repeated blocks.*compile=True"):
        make(model=nn.Linear(4, 4), activation_memory_budget=0.5)


def test_evaluation_keeps_everything():
    trainer = trained(steps=1, activation_memory_budget=LEAST)
    trainer.settle()
    before = trainer.model.blocks[0].norm.num_batches_tracked.clone()
    plain = trained(steps=1)
    assert trainer.evaluate(batches(3)) == plain.evaluate(batches(3))
    assert torch.equal(trainer.predict(batches()[0]), plain.predict(batches()[0]))
    assert torch.equal(before, trainer.model.blocks[0].norm.num_batches_tracked)


def test_a_resumed_run_goes_on_as_one_that_was_not_interrupted(tmp_path):
    part = trained(steps=3, activation_memory_budget=0.6)
    part.save(tmp_path / "point")
    resumed = make(activation_memory_budget=LEAST)
    resumed.load(tmp_path / "point")
    for batch in batches()[3:]:
        resumed.step(batch)
    resumed.settle()
    assert_same(trained(steps=6), resumed)


def test_the_precision_may_change_between_steps():
    runs = []
    for budget in (None, LEAST):
        trainer = trained("fp32", steps=2, activation_memory_budget=budget)
        trainer.change_plan("delayed")
        for batch in batches()[2:]:
            trainer.step(batch)
        trainer.settle()
        runs.append(trainer)
    assert_same(*runs)


def test_the_largest_batch_is_found_and_leaves_nothing_behind():
    trainer, untouched = make(activation_memory_budget=LEAST), make(activation_memory_budget=LEAST)
    found = find_batch_size(trainer, lambda size: (INPUTS[:size], LABELS[:size]), limit=8)
    assert found.size == 8
    assert_same(trainer, untouched)
    for each in (trainer, untouched):
        torch.manual_seed(3)
        for batch in batches(3):
            each.step(batch)
        each.settle()
    assert_same(trainer, untouched)


def test_a_step_that_is_skipped_names_the_module_and_leaves_nothing():
    bad = INPUTS[:2].clone()
    bad[0, 0, 0] = float("inf")
    runs = []
    for budget in (None, LEAST):
        trainer = trained(steps=2, activation_memory_budget=budget)
        result = trainer.step((bad, LABELS[:2]))
        assert result.status == "skipped"
        assert result.first_bad_module == "blocks.0.norm"
        trainer.step(batches()[2])
        trainer.settle()
        runs.append(trainer)
    assert_same(*runs)


def test_the_replay_of_a_skipped_step_keeps_to_the_budget_and_looks_at_each_module_once(monkeypatch):
    trainer, seen, checked = trained(steps=2, activation_memory_budget=LEAST), [], []
    init, bad = BlockState.__init__, replay._bad

    def noted(self, block, device, writes):
        seen.append(block)
        init(self, block, device, writes)

    monkeypatch.setattr(BlockState, "__init__", noted)
    monkeypatch.setattr(replay, "_bad", lambda tree: checked.append(is_computed_again()) or bad(tree))
    inputs = INPUTS[:2].clone()
    inputs[0, 0, 0] = float("inf")
    assert trainer.step((inputs, LABELS[:2])).status == "skipped"
    assert seen == 2 * list(trainer.model.blocks)
    assert checked
    assert not any(checked)


def test_the_monitor_counts_what_it_would_without():
    usages = []
    for budget in (None, LEAST):
        trainer = trained("bf16", activation_memory_budget=budget, monitor_every=1, statistics_every=1)
        usages.append((trainer.monitor.log_precision_usage(), trainer.stepper.flops, trainer.monitor.alarms_raised))
    (plain, flops, alarms), (budgeted, budgeted_flops, budgeted_alarms) = usages
    assert plain.counts == budgeted.counts
    assert flops == budgeted_flops
    assert alarms == budgeted_alarms
    assert plain.statistics == budgeted.statistics


def test_with_compressed_activations_blocks_keep_their_inputs_as_they_are():
    trainer = make(activations=ActivationSettings(min_bytes=1), activation_memory_budget=LEAST)
    trainer.step((INPUTS.repeat(8, 1, 1), LABELS.repeat(8, 1)))
    saved = trainer.activations.saved
    blocks = [entry for entry in saved if entry.module.startswith("blocks")]
    assert not [entry for entry in blocks if entry.reason is SavedReason.COMPRESSED]
    assert [entry for entry in saved if entry.module == "head" and entry.reason is SavedReason.COMPRESSED]
    kept = [entry for entry in blocks if entry.reason is SavedReason.OPERATION]
    assert sum(entry.bytes_after for entry in kept) == sum(entry.bytes_before for entry in kept) > 0


def test_weights_that_are_cast_in_one_pass(monkeypatch):
    monkeypatch.setattr(step, "SLOWER_IN_ONE_PASS", ())
    for options in ({}, {"gradient_accumulation_steps": 2}):
        assert_same(trained("bf16", **options), trained("bf16", **options, activation_memory_budget=LEAST))


def test_with_auto_trials_are_within_the_budget_too_and_blocks_are_chosen_once_the_plan_is(monkeypatch):
    recomputed = []

    def noted(self, block, device, writes):
        recomputed.append(block)
        made(self, block, device, writes)

    made = BlockState.__init__
    trainer = make("auto", activation_memory_budget=LEAST, adapt=False)
    tried = []

    def choose(_model, run, **_):
        monkeypatch.setattr(BlockState, "__init__", noted)
        tried.append(run())
        tried[0].backward()
        monkeypatch.setattr(BlockState, "__init__", made)
        return PrecisionPlan.of("fp32")

    monkeypatch.setattr(planning, "choose_plan", choose)
    trainer.step(batches()[0])
    trainer.settle()
    assert recomputed == list(trainer.model.blocks)
    assert len(trainer.recomputed_blocks.recomputed) == 4
