"""Progress: a bar where it is wanted, nothing elsewhere, and no waiting for what it shows."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.trainer import progress
from deepseek_mp.trainer.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """What a terminal of 100 columns is sent; every change is shown at once."""
    written = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=written))
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=written, force_terminal=True, width=100, legacy_windows=False)
    )
    return written


def trainer_at(step, loss=0.5, skipped=0):
    return SimpleNamespace(
        recorder=SimpleNamespace(running_loss=loss),
        steps_attempted=step,
        steps_applied=step - skipped,
        position=SimpleNamespace(epoch=1),
    )


def batches(count):
    return [(torch.ones(2, 2), torch.zeros(2, 1))] * count


def test_an_epoch_shows_its_batches_its_loss_and_what_was_skipped(screen):
    with Progress(True) as shown:
        shown.epoch(1, 3, 5)
        shown.advance(trainer_at(1))
        shown.advance(trainer_at(2, loss=0.25, skipped=1))
        shown._bar.refresh()
    text = screen.getvalue()
    assert "epoch 2/3" in text
    assert "epoch 2: loss 0.2500, 1 skipped" in text
    assert "2/5" in text


def test_a_loader_without_a_length_shows_what_is_done(screen):
    with Progress(True) as shown:
        shown.epoch(0, 1, None)
        shown.advance(trainer_at(1))
        shown._bar.refresh()
    assert "1/?" in screen.getvalue()


def test_measuring_shows_its_stage_and_share(screen):
    with Progress(True) as shown:
        shown.stage("timing layers", 0.25)
        shown.stage("timing a step", 0.5)
        shown._bar.refresh()
    text = screen.getvalue()
    assert "timing a step" in text
    assert "50/100" in text
    assert len(shown._bar.tasks) == 1


def test_a_new_epoch_replaces_the_one_before(screen):
    with Progress(True) as shown:
        shown.epoch(0, 2, 5)
        shown.epoch(1, 2, 5)
        assert [task.description for task in shown._bar.tasks] == ["epoch 2/2"]


def test_none_asks_whether_there_is_a_terminal(screen, monkeypatch):
    assert Progress(None)._bar is not None
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=io.StringIO()))
    assert Progress(None)._bar is None
    assert Progress(True)._bar is not None
    assert Progress(False)._bar is None


def test_nothing_is_shown_unless_wanted(screen):
    with Progress(False) as shown:
        shown.stage("x", 0.5)
        shown.epoch(0, 1, 3)
        shown.advance(trainer_at(1))
    assert screen.getvalue() == ""


def test_the_bar_is_taken_away_after_an_exception(screen):
    shown = Progress(True)

    def stopped():
        with shown:
            shown.epoch(0, 1, 3)
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        stopped()
    assert not shown._bar.live.is_started


@pytest.mark.parametrize("mode", ["fp32", "auto"])
def test_a_fit_shows_measuring_and_epochs(screen, monkeypatch, tmp_path, mode):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", "off")
    torch.manual_seed(0)
    trainer = MixedPrecisionTrainer(nn.Linear(2, 1), mode, device="cpu", progress=True)
    trainer.fit(batches(3), 2)
    text = screen.getvalue()
    assert "epoch 2: loss" in text
    assert ("recording the layers" in text) == (mode == "auto" and trainer.capabilities.admissible() != ("fp32",))


def test_a_fit_without_a_terminal_prints_nothing(capsys):
    MixedPrecisionTrainer(nn.Linear(2, 1), "fp32", device="cpu").fit(batches(3))
    assert capsys.readouterr() == ("", "")
