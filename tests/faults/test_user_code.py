"""What users' own code does around a step: regions, callbacks, momentum encoders, odd batches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from deepseek_mp import Callback, LossScalePolicy, MixedPrecisionTrainer, backends
from deepseek_mp import nn as nn_of_package
from deepseek_mp.errors import CheckpointError, ConfigError, LoaderError
from deepseek_mp.records import read_run
from deepseek_mp.trainer.checkpoint import read_checkpoint, write_checkpoint


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def trainer_of(model, mode="fp32", policy="dynamic", **options):
    return MixedPrecisionTrainer(
        model, mode, policy, **{"optimizer": sgd, "device": "cpu", "progress": False} | options
    )


def batches(count, size=6):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 4, generator=generator), torch.arange(size) % 2) for _ in range(count)]


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a, b):
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_region_of_the_caller_changes_nothing(mode):
    alone, inside = trainer_of(linear(), mode), trainer_of(linear(), mode)
    for batch in batches(4):
        alone.step(batch)
        with torch.autocast("cpu", torch.bfloat16):
            inside.step(batch)
    assert_equal(weights(alone.model), weights(inside.model))


def test_one_region_of_the_caller_around_all_steps_leaves_no_old_casts():
    alone, inside = trainer_of(linear(), "bf16"), trainer_of(linear(), "bf16")
    for batch in batches(4):
        alone.step(batch)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in batches(4):
            inside.step(batch)
    assert_equal(weights(alone.model), weights(inside.model))


@pytest.mark.parametrize("hook", ["on_gradients", "on_step"])
def test_saving_while_a_step_is_being_applied_is_refused(tmp_path, hook):
    class Saves(Callback):
        pass

    setattr(Saves, hook, lambda self, trainer, *_: trainer.save(tmp_path))
    trainer = trainer_of(linear(), callbacks=[Saves()])
    with pytest.raises(ConfigError, match="between steps"):
        trainer.step(batches(1)[0])
    assert not list(tmp_path.iterdir())


class MomentumEncoder(nn.Module):
    """A frozen copy that forward moves towards the trained layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.slow = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)

    def forward(self, inputs):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.layer.parameters(), strict=True):
                slow.lerp_(fast, 0.5)
        return self.layer(inputs) + self.slow(inputs)


def test_a_skipped_step_takes_back_what_forward_wrote_to_frozen_parameters():
    trainer = trainer_of(MomentumEncoder())
    good, bad = batches(2)
    trainer.step(good)
    before = weights(trainer.model)
    assert trainer.step((bad[0] * float("nan"), bad[1])).status == "skipped"
    assert_equal(before, weights(trainer.model))


def test_a_small_first_micro_batch_does_not_make_fp16_overflow():
    """Weights are relative to the largest micro-batch seen, so they do not exceed one after the first window."""
    labels = [torch.full((256,), -100) for _ in range(8)]
    for i, target in enumerate(labels):
        target[: 1 if i % 2 == 0 else 256] = 1
    inputs = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    trainer = trainer_of(linear(), "fp16", 2.0**14, gradient_accumulation_steps=2, emulate=True)
    results = [trainer.step((inputs, target)) for target in labels]
    assert [r.status for r in results[1::2]][1:] == ["applied"] * 3


@pytest.mark.parametrize("ignored", [0, -100])
def test_accumulation_counts_the_labels_that_the_loss_module_counts(ignored):
    loss_fn = nn.CrossEntropyLoss(ignore_index=ignored)
    inputs, target = (
        torch.randn(8, 4, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]),
    )
    whole = trainer_of(linear(), loss_fn=loss_fn)
    whole.step((inputs, target))
    parts = trainer_of(linear(), loss_fn=loss_fn, gradient_accumulation_steps=2)
    parts.step((inputs[:4], target[:4]))
    parts.step((inputs[4:], target[4:]))
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(parts.model.state_dict()[name], value)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_accumulation_and_evaluation_weigh_classes_as_the_loss_module_does(loss):
    loss_fn = loss(torch.tensor([1.0, 20.0]))
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 0, 0, 0, 1, 1, 1, -100, -100])
    whole, parts = (
        trainer_of(linear(), loss_fn=loss_fn),
        trainer_of(linear(), loss_fn=loss_fn, gradient_accumulation_steps=3),
    )
    split = [(inputs[i : i + 3], target[i : i + 3]) for i in (0, 3, 6)]
    split[2] = inputs[7:], target[7:]  # nothing that counts
    split[1] = inputs[3:7], target[3:7]
    alone = whole.evaluate([(inputs, target)])["loss"]
    assert whole.evaluate(split)["loss"] == pytest.approx(alone, rel=1e-6)
    whole.step((inputs, target))
    results = [parts.step(batch) for batch in split]
    assert results[-1].status == "applied"
    assert results[-1].loss == pytest.approx(alone, rel=1e-6)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(parts.model)[name], value)


@pytest.mark.parametrize("loss_fn", [None, nn.MSELoss(), F.mse_loss])
def test_sequences_of_different_lengths_count_by_their_elements(loss_fn):
    def net():
        torch.manual_seed(0)
        return nn.Linear(4, 2)

    parts = trainer_of(net(), loss_fn=loss_fn, gradient_accumulation_steps=2)
    split = [(torch.randn(2, length, 4), torch.randn(2, length, 2)) for length in (1, 7)]
    flat = [torch.cat([part.flatten(0, 1) for part in column]) for column in zip(*split, strict=True)]
    whole = F.mse_loss(net()(flat[0]), flat[1]).item()
    assert parts.evaluate(split)["loss"] == pytest.approx(whole)
    assert [parts.step(batch) for batch in split][-1].loss == pytest.approx(whole)


def test_metrics_and_loaders_compute_outside_of_the_region():
    formats = []

    class Loader:
        def __iter__(self):
            formats.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            yield from batches(1)

    def metric(output, target):
        formats.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return 0.0

    trainer_of(linear(), "bf16").evaluate(Loader(), metrics={"mine": metric})
    assert formats == [torch.float32] * 2


def test_every_report_has_a_sampled_step():
    trainer = trainer_of(linear(), monitor_every=500)
    for _ in range(3):
        for batch in batches(4):
            trainer.step(batch)
        usage = trainer.monitor.log_precision_usage()
        assert (usage.sampled_steps, usage.steps) == (1, 4)


@pytest.mark.parametrize("refused", ["val_loader", "evaluate"])
def test_a_loader_that_is_none_is_refused_before_anything_is_done(tmp_path, refused):
    trainer = trainer_of(linear(), run_dir=tmp_path / "run")
    with pytest.raises(LoaderError, match="5"):
        trainer.fit(batches(1), val_loader=5) if refused == "val_loader" else trainer.evaluate(5)
    assert not (tmp_path / "run").exists()


def test_complex_parameters_train_with_the_default_optimizer():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 2, dtype=torch.complex64))

        def forward(self, inputs):
            return (inputs.to(torch.complex64) @ self.weight).abs()

    trainer = MixedPrecisionTrainer(Complex(), "fp32", device="cpu", progress=False)
    assert trainer.step(batches(1)[0]).status == "applied"


def test_a_policy_needs_nothing_but_update():
    class Halves(LossScalePolicy):
        def update(self, nonfinite, amax):
            self.scale.mul_(0.5)

    trainer = trainer_of(linear(), "fp16", Halves(64.0), emulate=True)
    assert [trainer.step(batch).scale for batch in batches(3)] == [64.0, 32.0, 16.0]


def test_a_loop_of_ones_own_continues_from_a_checkpoint(tmp_path):
    straight, first = trainer_of(linear()), trainer_of(linear())
    for batch in batches(6):
        straight.step(batch)
    for batch in batches(6)[:3]:
        first.step(batch)
    first.save(tmp_path)
    second = trainer_of(linear())
    second.load(tmp_path)
    assert second.steps_applied == 3
    for batch in batches(6)[3:]:
        second.step(batch)
    assert_equal(weights(straight.model), weights(second.model))


def test_a_checkpoint_without_a_part_of_the_state_changes_nothing(tmp_path):
    trainer = trainer_of(linear())
    trainer.step(batches(1)[0])
    snapshot = read_checkpoint(trainer.save(tmp_path / "whole"))
    state = {key: value for key, value in snapshot.state.items() if key != "counters"}
    write_checkpoint(tmp_path / "part" / "checkpoints", type(snapshot)(step=1, tensors=snapshot.tensors, state=state))
    other = trainer_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    before = weights(other.model)
    with pytest.raises(CheckpointError, match="counters"):
        other.load(tmp_path / "part")
    assert_equal(before, weights(other.model))


def test_a_learning_rate_that_the_checkpoint_overrides_is_said(tmp_path, caplog):
    first = trainer_of(linear())
    first.step(batches(1)[0])
    first.save(tmp_path)
    second = trainer_of(linear(), optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    with caplog.at_level("WARNING", "deepseek_mp"):
        second.load(tmp_path)
    assert "lr=0.1 from the checkpoint" in caplog.text


def test_a_fit_with_nothing_left_to_do_says_so(caplog):
    trainer = trainer_of(linear(), loss_fn=F.cross_entropy)
    trainer.fit(batches(2), epochs=1)
    with caplog.at_level("WARNING", "deepseek_mp"):
        trainer.fit(batches(2), epochs=1)
    assert "nothing to train" in caplog.text


def test_labels_reach_the_model_only_if_its_forward_takes_them():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x)

    batch = {"x": torch.ones(3, 4), "labels": torch.zeros(3, dtype=torch.long)}
    trainer = trainer_of(Plain())
    assert trainer.step(batch).status == "applied"
    assert trainer.predict(batch).shape == (3, 2)


def test_a_new_run_does_not_replace_the_checkpoints_of_another(tmp_path):
    trainer_of(linear(), run_dir=tmp_path).fit(batches(2), epochs=1)
    other = trainer_of(linear(), run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"step-00000002.*Pass resume="):
        other.fit(batches(2), epochs=1)
    assert other.steps_attempted == 0
    assert other.fit(batches(2), epochs=2, resume=tmp_path).steps_applied == 4


def test_an_interrupted_fit_says_how_to_go_on(tmp_path, caplog):
    class Interrupts(Callback):
        def on_step(self, trainer, facts):
            if trainer.steps_attempted == 3:
                raise KeyboardInterrupt("Ctrl-C")

    trainer = trainer_of(linear(), run_dir=tmp_path, callbacks=[Interrupts()], checkpoint_every=1)
    with caplog.at_level("WARNING", "deepseek_mp"), pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        trainer.fit(batches(4), epochs=1)
    assert "after 3 steps" in caplog.text
    assert f"resume={str(tmp_path)!r}" in caplog.text


def test_auto_takes_a_frozen_base_in_bf16_with_trained_parts_in_fp32(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", "off")

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.base = nn.Linear(4, 2).bfloat16().requires_grad_(False)
            self.down, self.up = nn.Linear(4, 1, bias=False), nn.Linear(1, 2, bias=False)

        def forward(self, inputs):
            return self.base(inputs) + self.up(self.down(inputs))

    if "bf16" not in backends.capabilities("cpu").admissible():
        pytest.skip("needs a CPU with BF16 units")
    trainer = trainer_of(LowRank(), "auto")
    assert trainer.step(batches(1)[0]).status == "applied"
    assert trainer.plan.base.name == "bf16"


def test_a_step_is_recorded_although_its_scheduler_raises(tmp_path):
    trainer = trainer_of(
        linear(), run_dir=tmp_path, scheduler=lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=2)
    )
    with pytest.raises(ValueError, match="Tried to step 3 times"):
        trainer.fit(batches(4), epochs=1)
    assert trainer.steps_applied == len(read_run(tmp_path).metrics) == 3


def test_optimizer_state_that_belongs_to_no_parameter_is_refused_when_saving(tmp_path):
    trainer = trainer_of(linear())
    trainer.step(batches(1)[0])
    trainer.optimizer.state["global"] = {"k": 1}
    with pytest.raises(CheckpointError, match="'global'"):
        trainer.save(tmp_path)


def test_workers_that_are_kept_are_warned_of(caplog):
    loader = DataLoader(TensorDataset(*batches(1)[0]), batch_size=3, num_workers=1, persistent_workers=True)
    with caplog.at_level("WARNING", "deepseek_mp"):
        trainer_of(linear()).fit(loader, epochs=1)
    assert "keeps its workers" in caplog.text


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))


@pytest.mark.parametrize(("mode", "other"), [("fp8", "fp32"), ("fp32", "fp8"), ("bf16", None)])
def test_a_model_that_others_converted_is_not_trained_in_a_precision_that_its_trainer_does_not_have(mode, other):
    trainer, alone = (trainer_of(wide(), mode, emulate=True) for _ in range(2))
    alone.step(batches(1)[0])
    if other is None:
        nn_of_package.revert(trainer.model)
    else:
        trainer_of(trainer.model, other, emulate=True)
    before = weights(trainer.model)
    with pytest.raises(ConfigError, match=rf"has (plan {other or '.*'}|no plan|plan row) in force now, not plan "):
        trainer.step(batches(1)[0])
    assert_equal(before, weights(trainer.model))
    trainer.change_plan(trainer.plan)
    trainer.step(batches(1)[0])
    assert_equal(weights(alone.model), weights(trainer.model))


def test_two_trainers_of_one_precision_train_one_model_in_turn():
    model, alone = wide(), trainer_of(wide(), "fp8", emulate=True)
    pair = [trainer_of(model, "fp8", emulate=True) for _ in range(2)]
    for index, batch in enumerate(batches(4)):
        alone.step(batch)
        pair[index % 2].step(batch)
    assert_equal(weights(alone.model), weights(model))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_trainer_is_refused_with_what_to_do_instead(copied):
    trainer = trainer_of(linear(), "bf16")
    with pytest.raises(ConfigError, match=r"a copy of a trainer.*Copy trainer\.model, or call trainer\.save"):
        copied(trainer)
