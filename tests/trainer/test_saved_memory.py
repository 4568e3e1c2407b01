"""A resumed run has what its first part chose to fit into memory, without a trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_gauge import MIB, MadeUp, batch, in_force
from torch import Tensor, nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import CheckpointError
from deepseek_mp.optim import AdamW, set_storage
from deepseek_mp.trainer import memory_trials
from deepseek_mp.trainer.memory_report import GIB
from deepseek_mp.trainer.memory_trials import Gauge

pytestmark = pytest.mark.usefixtures("fused_if_asked")


class Model(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(64, 80), nn.BatchNorm1d(80), nn.Dropout(0.5), nn.Linear(80, 3))


def trainer(mib: float | None = 600, mode: str = "bf16", **options: Any) -> Any:
    options = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
        "statistics_every": None,
    } | options
    memory = None if mib is None else mib * MIB / GIB
    return MixedPrecisionTrainer(Model(), mode, device="cpu", seed=0, emulate=True, memory=memory, **options)


@pytest.fixture
def gauge(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    made = MadeUp({"8bit": 300, "activations": 200, "sr": 100}, {"8bit": 0.1, "activations": 0.5, "sr": 0.2})
    monkeypatch.setattr(memory_trials, "Gauge", lambda: made)
    return made


@pytest.fixture
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(*_: object) -> int:
        raise AssertionError("a step was tried")

    monkeypatch.setattr(memory_trials, "Gauge", lambda: type("Never", (Gauge,), {"peak": peak})())


def weights(run: Any) -> list[Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


@pytest.mark.parametrize("mib", [400, 600, 2000])
@pytest.mark.parametrize("scheduled", [True, False])
def test_a_resumed_run_goes_on_bit_by_bit(
    gauge: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mib: float, scheduled: bool
) -> None:
    def make() -> Any:
        decay = (lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.9)) if scheduled else None
        return trainer(mib, scheduler=decay)

    whole = make()
    for number in range(6):
        whole.step(batch(8 + number))
        if number == 2:
            whole.save(tmp_path)
    tried = len(gauge.seen)
    resumed = make()
    resumed.load(tmp_path)
    assert in_force(resumed) == in_force(whole)
    assert resumed.memory == whole.memory
    for number in range(3, 6):
        resumed.step(batch(8 + number))
    assert len(gauge.seen) == tried
    assert (resumed.activations is None) == (whole.activations is None) == (mib != 400)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))


def test_auto_takes_plan_and_measures_from_the_checkpoint(gauge: MadeUp, tmp_path: Path) -> None:
    first = trainer(600)
    first.step(batch())
    first.save(tmp_path)
    resumed = trainer(600, mode="auto", adapt=False)
    resumed.load(tmp_path)
    assert in_force(resumed) == ("8bit", "sr")
    assert resumed.step(batch()).status == "applied"


def test_options_are_those_of_the_checkpoint_where_they_may_be(
    gauge: MadeUp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trainer(400)
    first.step(batch())
    assert "activations" in in_force(first)
    first.save(tmp_path)
    resumed = trainer(400, activations=True)
    resumed.load(tmp_path)
    assert "resumed without activations, which this run does not allow: it was set by hand" in caplog.text
    other = trainer(400, compile=True)
    other.load(tmp_path)
    assert other.config.activations is False
    assert "activations=True with compile=True" in caplog.text


@pytest.mark.usefixtures("no_trials")
def test_a_checkpoint_of_8_bit_states_loads_into_a_trainer_of_pytorchs_optimizer(tmp_path: Path) -> None:
    """Of a run that named them itself."""
    first = trainer(None, optimizer=lambda p: AdamW(p, lr=0.01, states="8bit"))
    set_storage(first.optimizer, first.model[0].weight, "bf16_sr")
    first.step(batch())
    first.save(tmp_path)
    resumed = trainer(600)
    resumed.load(tmp_path)
    assert in_force(resumed) == ("8bit", "sr")
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(first), strict=True))


def test_without_memory_such_a_checkpoint_is_refused(gauge: MadeUp, tmp_path: Path) -> None:
    first = trainer(700)
    first.step(batch())
    first.save(tmp_path)
    resumed = trainer(None)
    before = weights(resumed)
    with pytest.raises(CheckpointError, match=r"deepseek_mp.optim.AdamW with moments in 8 bits.*'auto'"):
        resumed.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), before, strict=True))


def test_a_checkpoint_that_does_not_fit_leaves_the_optimizer_alone(gauge: MadeUp, tmp_path: Path) -> None:
    first = trainer(400)
    first.step(batch())
    first.save(tmp_path)
    resumed = trainer(400, ema_decay=0.9)
    config = resumed.config
    with pytest.raises(CheckpointError, match="averages"):
        resumed.load(tmp_path)
    assert type(resumed.optimizer) is torch.optim.AdamW
    assert resumed.config is config
    assert resumed.memory is None


def test_a_run_without_a_choice_makes_its_own_after_a_resume(gauge: MadeUp, tmp_path: Path) -> None:
    first = trainer(None)
    first.step(batch())
    first.save(tmp_path)
    resumed = trainer(800)
    resumed.load(tmp_path)
    resumed.step(batch())
    assert resumed.memory.taken == ("activations=True",)
    why = {line.name: line.why for line in resumed.memory.lines}
    assert why["states=8bit"] == "the optimizer stays PyTorch's: it has made steps already"
