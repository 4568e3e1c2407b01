"""The epochs of a fit: how far they go, and what is due between steps and after each epoch."""

from __future__ import annotations

import copy

import pytest
import torch
from small_runs import INPUTS, LABELS, accuracy, batches, make, same_models
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from deepseek_mp import Callback
from deepseek_mp.errors import LoaderError, NonFiniteError
from deepseek_mp.records import read_run

# -- how far a fit goes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps", "finished"),
    [(1, None, 5, 1), (2, None, 10, 2), (0, None, 0, 0), (9, 3, 3, 0), (9, 7, 7, 1), (1, 99, 5, 1), (3, 0, 0, 0),
     (1, 5, 5, 1), (9, 10, 10, 2)],
)  # fmt: skip
def test_a_fit_ends_after_its_epochs_or_its_steps(epochs, max_steps, steps, finished):
    result = make().fit(batches(), epochs, max_steps=max_steps)
    assert (result.steps_applied, result.steps_attempted, result.epochs) == (steps, steps, finished)
    assert len(result.history) == finished


def test_epochs_and_steps_count_the_whole_run():
    straight, parts = make(), make()
    torch.manual_seed(3)
    straight.fit(batches(), 3)
    torch.manual_seed(3)
    assert parts.fit(batches(), 1).epochs == 1
    assert parts.fit(batches(), 2, max_steps=7).steps_applied == 7
    assert parts.fit(batches(), 2).epochs == 2
    assert parts.fit(batches(), 2).epochs == 2
    assert parts.fit(batches(), 3).steps_applied == 15
    assert same_models(straight, parts)
    assert [e["loss"] for e in parts.history] == [e["loss"] for e in straight.history]


def test_steps_are_applied_ones():
    result = make().fit(batches(5, bad=[0, 2]), 2, max_steps=4)
    assert (result.steps_applied, result.steps_attempted) == (4, 7)


def test_an_epoch_that_ends_with_the_last_step_is_complete():
    trainer = make(scheduler=lambda o: ReduceLROnPlateau(o))
    result = trainer.fit(batches(), 5, max_steps=5, val_loader=batches(1))
    assert "val_loss" in result.history[0]
    assert trainer.scheduler.last_epoch == 1


class Unknown(IterableDataset):
    """A stream: DataLoader has a len() for it, which raises."""

    def __iter__(self):
        return iter(zip(INPUTS, LABELS, strict=True))


class Plain:
    def __iter__(self):
        yield from batches()


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(INPUTS[:20], LABELS[:20]), batch_size=4),
        DataLoader(Unknown(), batch_size=4, drop_last=True),
        Plain(),
        batches(),
        tuple(batches()),
    ],
    ids=["DataLoader", "stream", "generator function", "list", "tuple"],
)
@pytest.mark.parametrize("progress", [False, True])
def test_any_iterable_is_a_loader(loader, progress):
    def plain():
        torch.manual_seed(0)
        return nn.Linear(4, 3)

    known, other = make(model=plain()), make(model=plain(), progress=progress)
    known.fit(batches(), 2)
    assert other.fit(loader, 2).steps_applied == 10
    assert same_models(known, other)


def test_a_generator_is_one_epoch():
    trainer = make()
    assert trainer.fit(batch for batch in batches()).steps_applied == 5
    with pytest.raises(LoaderError, match=r"no batch in epoch 1.*generator is used up after one epoch"):
        make().fit((batch for batch in batches()), 2)


# -- what a fit does on the way ----------------------------------------------------------------------------------


def test_the_history_is_the_mean_over_applied_steps_and_the_validation():
    losses = []

    class Losses(Callback):
        def on_step(self, trainer, facts):
            losses.append((facts.status, facts.loss))

    result = make(callbacks=[Losses()]).fit(batches(5, bad=[1]), val_loader=batches(), metrics={"accuracy": accuracy})
    (entry,) = result.history
    applied = [loss for status, loss in losses if status == "applied"]
    assert len(applied) == 4
    assert entry["loss"] == result.loss == pytest.approx(sum(applied) / 4)
    assert entry["skipped"] == 1
    assert entry.keys() >= {"val_loss", "val_accuracy", "seconds", "samples_per_second", "epoch"}
    assert 0 <= entry["val_accuracy"] <= 1
    assert result.seconds >= entry["seconds"]


@pytest.mark.parametrize("validated", [True, False])
def test_a_plateau_scheduler_advances_once_an_epoch_on_the_validation_loss(validated):
    seen = []

    class Watched(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics)

    trainer = make(scheduler=Watched)
    result = trainer.fit(batches(), 2, val_loader=batches(2) if validated else None)
    assert seen == [entry["val_loss" if validated else "loss"] for entry in result.history]


def test_checkpoints_are_written_after_each_epoch_and_where_a_fit_stops(tmp_path):
    trainer = make(run_dir=tmp_path)
    trainer.fit(batches(), 9, max_steps=7)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000007"]


def test_checkpoints_are_written_every_so_many_steps_and_only_where_a_window_ends(tmp_path):
    saved = []
    trainer = make(run_dir=tmp_path, checkpoint_every=2, gradient_accumulation_steps=2)
    real = trainer.save
    trainer.save = lambda path: (saved.append((trainer.position.epoch, trainer.position.batch)), real(path))[1]
    trainer.fit(batches(), 2)
    assert saved == [(0, 4), (1, 0), (1, 2), (2, 0)]  # windows end behind batches 2, 4 and 5 of an epoch


def test_without_a_run_directory_no_checkpoint_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(checkpoint_every=1).fit(batches())
    assert list(tmp_path.iterdir()) == []


def test_too_many_skips_stop_the_fit_with_the_last_good_weights():
    trainer = make(max_skipped_steps=2)
    trainer.fit(batches(2), 1)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(NonFiniteError, match="2 steps in a row were skipped"):
        trainer.fit(batches(5, bad=range(5)), 2)
    assert all(torch.equal(v, before[name]) for name, v in trainer.model.state_dict().items())
    assert (trainer.steps_attempted, trainer.position.batch) == (4, 2)


# -- stopping -------------------------------------------------------------------------------------------------


class StopAfter(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_step(self, trainer, facts):
        if trainer.steps_attempted == self.steps:
            trainer.stop()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_fit_goes_on_as_if_nothing_had_happened(tmp_path, accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    straight = make(callbacks=[StopAfter(99)], **options)
    torch.manual_seed(3)
    straight.fit(batches(), 3)
    stopped = make(callbacks=[StopAfter(4)], run_dir=tmp_path, **options)
    torch.manual_seed(3)
    result = stopped.fit(batches(), 3)
    assert (result.steps_applied, result.epochs) == (4, (4 * accumulation) // 6)
    assert [a.outcome for a in read_run(tmp_path).attempts] == ["stopped"]
    resumed = make(callbacks=[StopAfter(99)], run_dir=tmp_path, **options)
    assert resumed.fit(batches(), 3, resume=tmp_path).epochs == 3
    assert same_models(straight, resumed)
    assert stopped.fit(batches(), 3).epochs == 3  # the same trainer goes on too


def test_a_fit_that_is_stopped_before_it_begins_trains_nothing():
    class Refuse(Callback):
        def on_fit_start(self, trainer):
            trainer.stop()

    assert make(callbacks=[Refuse()]).fit(batches(), 3).steps_attempted == 0
