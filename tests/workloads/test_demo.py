"""The demo's comparison is fair, its measurements mean what they say, and both tasks can learn."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.trainer import StepFacts
from deepseek_mp.workloads import demo
from deepseek_mp.workloads.data import Data, ExampleBatches
from deepseek_mp.workloads.demo import StepLog, Task, accuracy, run_demo, tasks, train

CPU = torch.device("cpu")


def small_task(*, steps: int = 6) -> Task:
    """A line through points: eight batches of four in an epoch."""
    inputs = torch.arange(32.0).view(-1, 1) / 32

    def model() -> nn.Module:
        layer = nn.Linear(1, 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    return Task(
        title="a line",
        model=model,
        data=lambda: Data(
            train=ExampleBatches(inputs, 1 + inputs, batch_size=4, seed=0),
            validation=ExampleBatches(inputs, 1 + inputs, batch_size=16, seed=None),
        ),
        loss_fn=nn.functional.mse_loss,
        steps=steps,
    )


def test_a_run_has_the_steps_asked_for_across_epochs_and_its_losses() -> None:
    found = train("line", small_task(steps=20), "fp32", CPU, seed=0, progress=False)
    assert found.steps == 20
    assert found.format == "fp32"
    # The first prediction is 0, so the first loss is the mean square of that batch's targets.
    assert 1 < found.first_loss < 4
    assert found.last_loss < found.first_loss
    assert found.validation_loss < found.first_loss
    assert found.fallbacks == {}
    assert set(found.operations) <= {"fp32", "integer"}


def test_the_last_loss_is_the_mean_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LAST", 3)
    logs: list[StepLog] = []

    class Kept(StepLog):
        def __init__(self) -> None:
            super().__init__()
            logs.append(self)

    monkeypatch.setattr(demo, "StepLog", Kept)
    found = train("line", small_task(steps=8), "fp32", CPU, seed=0, progress=False)
    # One more step was trained to measure its memory; it is not part of the run.
    losses = logs[0].losses[:8]
    assert found.first_loss == losses[0]
    assert found.last_loss == pytest.approx(sum(losses[-3:]) / 3)


def test_the_first_interval_and_its_decision_are_not_in_the_time_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.5, 101.0, 109.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    log, trainer = StepLog(), object()
    for loss in (4.0, 3.0, 2.0, 1.0):
        log.on_step(trainer, StepFacts(status="applied", loss=loss))  # type: ignore[arg-type]
    assert log.losses == [4.0, 3.0, 2.0, 1.0]
    assert log.step_ms == 500.0


def test_both_runs_see_the_same_weights_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def record(name: str, task: Task, mode: str, device: torch.device, **kwargs: Any) -> str:
        weights = torch.cat([p.flatten() for p in task.model().parameters()])
        inputs, targets = next(iter(task.data().train))
        seen.append((name, mode, weights.double().sum().item(), inputs.double().sum().item(), targets.sum().item()))
        return mode

    monkeypatch.setattr(demo, "train", record)
    result = run_demo(quick=True, device="cpu", seed=5)
    assert [c.runs for c in result.comparisons] == [("fp32", "auto")] * 2
    assert [row[:2] for row in seen] == [("digits", "fp32"), ("digits", "auto"), ("text", "fp32"), ("text", "auto")]
    assert seen[0][2:] == seen[1][2:]
    assert seen[2][2:] == seen[3][2:]


def test_accuracy_is_the_share_of_highest_scores_at_the_target() -> None:
    scores = torch.tensor([[[0.1, 0.9], [0.8, 0.2]], [[0.3, 0.7], [0.4, 0.6]]])
    assert accuracy(scores, torch.tensor([[1, 1], [1, 0]])) == 0.5


def test_the_full_tasks_are_large_enough_to_tell_formats_apart() -> None:
    full, quick = tasks(), tasks(quick=True)
    for name in full:
        count = {
            kind: sum(p.numel() for p in t[name].model().parameters()) for kind, t in (("full", full), ("q", quick))
        }
        assert count["full"] > 10 * count["q"]
        assert full[name].steps > 5 * quick[name].steps


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task 'txt'. Allowed: digits, text.*Did you mean 'text'"):
        run_demo(only="txt", quick=True)
