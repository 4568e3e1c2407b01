"""Accumulation, data and loops under faults, beside what plain PyTorch does then.

The letters and numbers in the names are those of the project's list of faults, section E.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from deepseek_mp import Callback, MixedPrecisionTrainer
from deepseek_mp.errors import LoaderError
from deepseek_mp.testing import Fault, FaultInjector, InjectedError


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def sgd(params):
    return torch.optim.SGD(params, lr=0.5)


def dropout_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def samples(count):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator)
    return inputs, inputs[:, :3].argmax(dim=1)


def cut(sizes):
    """Batches of these sizes."""
    inputs, labels = samples(sum(sizes))
    return list(zip(inputs.split(sizes), labels.split(sizes), strict=True))


def whole(batches):
    """One batch that holds them all."""
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def trained(model, batches, **options):
    trainer = MixedPrecisionTrainer(model, "fp32", optimizer=sgd, device="cpu", **options)
    trainer.fit(batches)
    return trainer


def after_big_batches(model, windows, loss_fn=F.cross_entropy):
    """What plain PyTorch makes of the model when each window is one batch."""
    optimizer = sgd(model.parameters())
    for inputs, target in map(whole, windows):
        loss_fn(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def steps(trainer, batches):
    for batch in batches:
        trainer.step(batch)


def assert_equal_models(a, b, **tolerance):
    for (name, one), two in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_identical(a, b):
    assert_equal_models(a, b, rtol=0, atol=0)


# -- E01, E02, E03: what a window is worth ----------------------------------------------------------


@pytest.mark.parametrize(("accumulation", "windows"), [(4, [4, 1]), (3, [3, 2]), (2, [2, 2, 1])])
def test_e01_a_short_last_window_counts_as_what_is_in_it(accumulation, windows):
    batches = cut([4] * 5)
    trainer = trained(linear(), batches, gradient_accumulation_steps=accumulation)
    parts = [batches[sum(windows[:i]) : sum(windows[: i + 1])] for i in range(len(windows))]
    assert_equal_models(trainer.model, after_big_batches(linear(), parts))
    assert trainer.steps_applied == len(windows)


def test_e01_dividing_by_the_full_window_shrinks_the_last_update_in_plain_torch():
    weight, steps = nn.Parameter(torch.zeros(1)), []
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for micro in range(5):
        (weight.sum() / 4).backward()
        if micro % 4 == 3 or micro == 4:
            before = weight.item()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(before - weight.item())
    assert steps == [1.0, 0.25]  # every micro-batch has the gradient 1: both should be 1.0


def test_e01_unequal_micro_batches_weigh_by_their_samples():
    batches = cut([8, 1, 3, 2])
    trainer = trained(linear(), batches, gradient_accumulation_steps=3)
    assert_equal_models(trainer.model, after_big_batches(linear(), [batches[:3], batches[3:]]))


def test_e02_an_epoch_shorter_than_the_window_is_a_window():
    batches = cut([3, 3, 3])
    trainer = MixedPrecisionTrainer(linear(), "fp32", optimizer=sgd, device="cpu", gradient_accumulation_steps=8)
    trainer.fit(batches, epochs=2)
    assert trainer.steps_applied == 2
    assert_equal_models(trainer.model, after_big_batches(linear(), [batches, batches]))


def masked(sizes, kept):
    """Batches of `sizes` rows of 6 tokens, of which `kept` per batch have a label."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for rows, count in zip(sizes, kept, strict=True):
        inputs = torch.randn(rows, 6, 4, generator=generator)
        labels = inputs[..., :3].argmax(dim=-1)
        labels.view(-1)[count:] = -100
        batches.append((inputs, labels))
    return batches


def token_loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def counted_token_loss(output, target):
    return token_loss(output, target), int((target != -100).sum())


@pytest.mark.parametrize("loss_fn", [None, token_loss, counted_token_loss])
def test_e03_variable_token_counts_are_normalised_by_all_tokens(loss_fn):
    batches = masked([2, 2, 2], [12, 1, 5])
    trainer = trained(linear(), batches, loss_fn=loss_fn, gradient_accumulation_steps=3)
    assert_equal_models(trainer.model, after_big_batches(linear(), [batches], token_loss))


def test_e03_a_micro_batch_without_labels_changes_nothing():
    batches = masked([2, 2, 2], [12, 0, 5])
    trainer = trained(linear(), batches, gradient_accumulation_steps=3)
    expected = after_big_batches(linear(), [[batches[0], batches[2]]], token_loss)
    assert_equal_models(trainer.model, expected)


def test_e03_a_mean_of_means_is_another_gradient_in_plain_torch():
    batches = masked([2, 2, 2], [12, 1, 5])
    naive, right = linear(), linear()
    for inputs, labels in batches:
        (token_loss(naive(inputs), labels) / len(batches)).backward()
    token_loss(right(whole(batches)[0]), whole(batches)[1]).backward()
    assert (naive.weight.grad - right.weight.grad).abs().max() > 0.05


# -- E04: a save inside an open window --------------------------------------------------------------


class Saving:
    """A loader that has the trainer save before it gives batch number `at` of epoch `epoch`."""

    def __init__(self, loader, folder, at, epoch=0):
        self.loader, self.folder, self.at, self.epoch, self.trainer = loader, folder, at, epoch, None

    def __iter__(self):
        for index, batch in enumerate(self.loader):
            if self.trainer is not None and (self.trainer.position.epoch, index) == (self.epoch, self.at):
                self.trainer.save(self.folder)
            yield batch


def shuffled():
    inputs, labels = samples(20)
    return DataLoader(TensorDataset(inputs, labels), batch_size=3, shuffle=True)  # 7 batches, the last of 2


def accumulating(**options):
    return MixedPrecisionTrainer(
        dropout_net(), "fp32", optimizer=lambda p: torch.optim.AdamW(p, lr=0.05), device="cpu",
        gradient_accumulation_steps=3, ema_decay=0.9, max_grad_norm=1.0, seed=3, **options,
    )  # fmt: skip


@pytest.mark.parametrize("at", range(1, 7))
def test_e04_resuming_inside_a_window_is_bit_identical(tmp_path, at):
    straight = accumulating()
    straight.fit(Saving(shuffled(), tmp_path, at), epochs=2)
    random_state = torch.get_rng_state()
    saving = Saving(shuffled(), tmp_path, at)
    first = saving.trainer = accumulating()
    first.fit(saving, epochs=2)
    second = accumulating()
    torch.manual_seed(99)
    second.fit(Saving(shuffled(), tmp_path, at), epochs=2, resume=tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    for other in (first, second):
        assert_identical(straight.model, other.model)
        assert all(torch.equal(a, other.ema.values[name]) for name, a in straight.ema.values.items())
        assert [e["loss"] for e in other.history] == [e["loss"] for e in straight.history]


@pytest.mark.parametrize("open_batches", [1, 2])
def test_e04_an_open_window_of_an_own_loop_continues_where_it_was_saved(tmp_path, open_batches):
    batches = cut([3] * 6)
    straight, first, second = accumulating(), accumulating(), accumulating()
    torch.manual_seed(7)
    steps(straight, batches)
    torch.manual_seed(7)
    steps(first, batches[: 3 + open_batches])
    first.save(tmp_path)
    torch.manual_seed(8)
    second.fit([], epochs=0, resume=tmp_path)
    steps(second, batches[3 + open_batches :])
    assert_identical(straight.model, second.model)


def test_e04_the_gradients_of_an_open_window_are_lost_by_a_plain_save():
    """Saving and loading model and optimizer, as torch's tutorials do, forgets half a window."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    (weight.sum() / 2).backward()
    saved = copy.deepcopy((weight.data, optimizer.state_dict()))
    restored = nn.Parameter(saved[0])
    optimizer = torch.optim.SGD([restored], lr=1.0)
    optimizer.load_state_dict(saved[1])
    (restored.sum() / 2).backward()
    optimizer.step()
    assert restored.item() == -0.5  # uninterrupted: -1.0


# -- E06, E07: loaders and memory that fail ---------------------------------------------------------


class Failing:
    """A loader that raises in place of batch `at`, as often as `times` says."""

    def __init__(self, loader, at, times=1):
        self.loader, self.at, self.times = loader, at, times

    def __iter__(self):
        for index, batch in enumerate(self.loader):
            if index == self.at and self.times:
                self.times -= 1
                raise OSError("disk gone")
            yield batch


@pytest.mark.parametrize("at", range(7))
def test_e06_after_a_loader_raised_the_state_is_that_of_the_last_step(at):
    straight, broken = accumulating(), accumulating()
    torch.manual_seed(3)
    straight.fit(shuffled(), epochs=2)
    torch.manual_seed(3)
    loader = Failing(shuffled(), at)
    with pytest.raises(OSError, match="disk gone"):
        broken.fit(loader, epochs=2)
    assert broken.steps_applied == at // 3
    assert broken.position.batch == at // 3 * 3
    assert all(p.grad is None for p in broken.model.parameters())
    broken.fit(loader, epochs=2)
    assert_identical(straight.model, broken.model)
    assert [e["loss"] for e in broken.history] == [e["loss"] for e in straight.history]


@pytest.mark.parametrize("at", range(7))
def test_e06_a_checkpoint_written_after_a_loader_raised_continues_bit_identically(tmp_path, at):
    straight, broken, resumed = accumulating(), accumulating(), accumulating()
    torch.manual_seed(3)
    straight.fit(shuffled(), epochs=2)
    torch.manual_seed(3)
    with pytest.raises(OSError, match="disk gone"):
        broken.fit(Failing(shuffled(), at), epochs=2)
    broken.save(tmp_path)
    torch.manual_seed(4)
    resumed.fit(shuffled(), epochs=2, resume=tmp_path)
    assert_identical(straight.model, resumed.model)


@pytest.mark.parametrize("loader", [[], DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))])
@pytest.mark.parametrize("mode", ["fp32", "auto"])
def test_e06_an_empty_loader_is_an_error_and_changes_nothing(tmp_path, loader, mode):
    model = dropout_net()
    before, folder = copy.deepcopy(model.state_dict()), tmp_path / "run"
    trainer = MixedPrecisionTrainer(model, mode, device="cpu", run_dir=folder)
    random_state = torch.get_rng_state()
    with pytest.raises(LoaderError, match=r"gave no batch in epoch 0.*Allowed.*drop_last"):
        trainer.fit(loader)
    assert not folder.exists()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.steps_attempted == 0


def test_e06_a_used_up_generator_stops_after_the_epoch_it_had(tmp_path):
    batches = cut([3] * 4)
    straight, trainer = accumulating(), accumulating()
    torch.manual_seed(3)
    straight.fit(batches, epochs=2)
    torch.manual_seed(3)
    with pytest.raises(LoaderError, match=r"gave no batch in epoch 1.*generator is used up"):
        trainer.fit((batch for batch in batches), epochs=2)
    assert (trainer.position.epoch, len(trainer.history)) == (1, 1)
    trainer.fit(batches, epochs=2)
    assert_identical(straight.model, trainer.model)


def test_e06_a_loader_that_ends_early_closes_its_window():
    trainer = accumulating()
    trainer.fit(cut([3] * 4))
    assert trainer.steps_applied == 2
    assert trainer.stepper.window.micro_batches == 0


def memory_error(trainer, micro_batch):
    """A hook that runs out of memory once, in the forward of the micro-batch of that number."""
    seen = iter(range(10**6))

    def hook(module, args, output):
        if trainer.model.training and next(seen) == micro_batch:
            raise torch.OutOfMemoryError("out of memory")

    return trainer.model[3].register_forward_hook(hook)


@pytest.mark.parametrize("at", range(7))
def test_e07_a_fit_tried_again_after_running_out_of_memory_is_bit_identical(at):
    straight, retried = accumulating(), accumulating()
    torch.manual_seed(3)
    straight.fit(shuffled(), epochs=2)
    torch.manual_seed(3)
    handle = memory_error(retried, at)
    loader = shuffled()
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        retried.fit(loader, epochs=2)
    handle.remove()
    retried.fit(loader, epochs=2)
    assert_identical(straight.model, retried.model)
    assert retried.steps_attempted == straight.steps_attempted


@pytest.mark.parametrize("at", range(3))
def test_e07_a_window_retried_in_an_own_loop_counts_once(at):
    batches = cut([3] * 6)
    straight, retried = accumulating(), accumulating()
    torch.manual_seed(5)
    steps(straight, batches)
    torch.manual_seed(5)
    steps(retried, batches[:3])
    handle = memory_error(retried, at)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        steps(retried, batches[3:])
    handle.remove()
    steps(retried, batches[3:])
    assert_identical(straight.model, retried.model)
    assert retried.steps_attempted == 2


def test_e07_memory_that_fails_in_the_optimizer_leaves_the_window_untried():
    batches = cut([3] * 6)
    straight, retried = accumulating(), accumulating()
    torch.manual_seed(5)
    steps(straight, batches)
    torch.manual_seed(5)
    steps(retried, batches[:3])
    with (
        FaultInjector(retried.model, retried.optimizer).add(Fault(kind="raise", where="optimizer")),
        pytest.raises(InjectedError, match="optimizer"),
    ):
        steps(retried, batches[3:])
    steps(retried, batches[3:])
    assert_identical(straight.model, retried.model)


def test_a_callback_that_raises_leaves_its_step_applied():
    class Once(Callback):
        def on_step(self, trainer, facts):
            if trainer.steps_applied == 2 and not trainer.history:
                raise KeyboardInterrupt("stopped by hand")

    straight, stopped = accumulating(), accumulating(callbacks=[Once()])
    torch.manual_seed(3)
    straight.fit(shuffled())
    torch.manual_seed(3)
    loader = shuffled()
    with pytest.raises(KeyboardInterrupt, match="stopped by hand"):
        stopped.fit(loader)
    assert stopped.position.batch == 6
    stopped.fit(loader)
    assert_identical(straight.model, stopped.model)
