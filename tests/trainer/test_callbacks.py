"""Callbacks: what may be one, which hooks are overridden, and in which order a fit calls them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deepseek_mp import Callback, MixedPrecisionTrainer
from deepseek_mp.errors import ConfigError
from deepseek_mp.records import read_run
from deepseek_mp.trainer.callbacks import check_callbacks, overrides, settings_of


class Diary(Callback):
    """Writes down every call."""

    def __init__(self, pages, name=""):
        self.pages, self.name = pages, name

    def _write(self, *words):
        self.pages.append((*([self.name] if self.name else []), *words))

    def on_fit_start(self, trainer):
        self._write("start", trainer.steps_attempted)

    def on_gradients(self, trainer):
        self._write("gradients", trainer.steps_attempted)

    def on_step(self, trainer, facts):
        self._write("step", trainer.steps_attempted, facts.status)

    def on_skip(self, trainer, facts, batches):
        self._write("skip", [index for index, _ in batches])

    def on_epoch_end(self, trainer, epoch, metrics):
        self._write("epoch", epoch, sorted(metrics))

    def on_fit_end(self, trainer, result):
        self._write("end", result.steps_applied)


def trainer_with(callbacks, **options):
    torch.manual_seed(0)
    return MixedPrecisionTrainer(nn.Linear(2, 1), "fp32", device="cpu", callbacks=callbacks, **options)


def batches(count, bad=()):
    made = [(torch.full((2, 2), 1.0 + i), torch.zeros(2, 1)) for i in range(count)]
    for index in bad:
        made[index][0].fill_(math.nan)
    return made


def test_hooks_are_called_in_the_order_of_what_happens():
    pages = []
    trainer_with([Diary(pages)], gradient_accumulation_steps=2).fit(batches(3), 2, val_loader=batches(1))
    entry = ["epoch", "loss", "samples_per_second", "seconds", "skipped", "val_loss"]
    assert pages == [
        ("start", 0),
        ("gradients", 0), ("step", 1, "applied"),
        ("gradients", 1), ("step", 2, "applied"),
        ("epoch", 0, entry),
        ("gradients", 2), ("step", 3, "applied"),
        ("gradients", 3), ("step", 4, "applied"),
        ("epoch", 1, entry),
        ("end", 4),
    ]  # fmt: skip


def test_callbacks_are_called_in_the_order_they_were_given():
    pages = []
    trainer_with([Diary(pages, "first"), Diary(pages, "second")]).fit(batches(1))
    assert [page[0] for page in pages] == ["first", "second"] * 5
    assert [page[1] for page in pages[::2]] == ["start", "gradients", "step", "epoch", "end"]


def test_a_skipped_step_tells_which_batches_were_in_it():
    pages = []
    trainer_with([Diary(pages)], gradient_accumulation_steps=2).fit(batches(4, bad=[3]))
    assert pages[3:6] == [("gradients", 1), ("step", 2, "skipped"), ("skip", [2, 3])]


def test_the_batches_of_a_skipped_step_are_those_of_the_loader():
    given = batches(2, bad=[1])
    seen = []

    class Quarantine(Callback):
        def on_skip(self, trainer, facts, batches):
            seen.extend(batches)

    trainer_with([Quarantine()]).fit(given)
    assert [index for index, _ in seen] == [1]
    assert seen[0][1] is given[1]


def test_gradients_are_unscaled_means_of_the_window_and_may_be_changed():
    norms = []

    class Doubles(Callback):
        def on_gradients(self, trainer):
            norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item())
            for p in trainer.model.parameters():
                p.grad.mul_(2)

    results = []
    for callbacks in ([], [Doubles()]):
        trainer = trainer_with(callbacks, gradient_accumulation_steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        for batch in batches(2):
            result = trainer.step(batch)
        results.append(result.grad_norm)
    assert norms[0] == pytest.approx(results[0])
    assert results[1] == pytest.approx(2 * results[0])


def test_overriding_is_seen_in_the_class_and_its_bases():
    class Plain(Callback):
        pass

    class Child(Diary):
        pass

    assert overrides(Diary([]), "on_gradients")
    assert overrides(Child([]), "on_gradients")
    assert not overrides(Plain(), "on_gradients")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "callbacks with 5"),
        ([Callback(), "x"], "callbacks with 'x'"),
        ([Callback], "callbacks with <class"),
        (Callback(), r"callbacks=<.*Callback object"),
        (None, "callbacks with None"),
    ],
)
def test_only_a_list_of_callbacks_is_taken(given, message):
    with pytest.raises(ConfigError, match=rf"{message}.*Allowed: a list of objects of deepseek_mp\.Callback"):
        check_callbacks(given)


def test_any_iterable_of_callbacks_becomes_a_tuple():
    one, two = Callback(), Callback()
    assert check_callbacks(iter([one, two])) == (one, two)
    assert check_callbacks(()) == ()


class Told(Callback):
    """Says what it was told."""

    def __init__(self, given):
        self.given = given

    def recorded_settings(self):
        return self.given


def test_settings_are_those_of_callbacks_that_give_any():
    callbacks = [Told({"rate": 3}), Diary([]), Told({}), Told({"rate": 4})]
    assert settings_of(callbacks) == {"Told": {"rate": 3}, "Told 3": {"rate": 4}}
    assert Callback().recorded_settings() == {}


def test_settings_are_in_the_record_of_a_run(tmp_path):
    trainer_with([Diary([]), Told({"rate": 3})], run_dir=tmp_path / "told").fit(batches(1))
    assert read_run(tmp_path / "told").info["callbacks"] == {"Told": {"rate": 3}}
    trainer_with([Diary([])], run_dir=tmp_path / "none").fit(batches(1))
    assert "callbacks" not in read_run(tmp_path / "none").info


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"recorded_settings\(\) of Told gave None. Allowed: a mapping"),
        ({"rate": object()}, r"callbacks\.Told\.rate is a object.*run record cannot hold"),
    ],
)
def test_settings_that_no_record_can_hold_are_refused(tmp_path, given, message):
    trainer = trainer_with([Told(given)], run_dir=tmp_path)
    with pytest.raises(ConfigError, match=message):
        trainer.fit(batches(1))
