"""Live precision in healthy training: layers run low for hundreds of steps, and neither guard nor alarm speaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_mp import AdaptivePrecision, AdaptiveSettings, MixedPrecisionTrainer
from deepseek_mp.precision import Reason
from deepseek_mp.workloads.data import Batches, ExampleBatches, digits, library_windows
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss
from deepseek_mp.workloads.resnet import class_loss

BUDGETS = {
    "usual": {},
    # Nothing but a guard raises a layer then: all of them run low to the end.
    "loose": {"loss_budget": 1e3, "noise_budget": 1e3, "pays": 1e-6},
}


@dataclass(frozen=True)
class Task:
    """A model, its batches and its loss."""

    model: nn.Module
    data: Batches
    loss_fn: Callable[[Tensor, Tensor], Tensor]


def text() -> Task:
    model = byte_gpt(GPTConfig(width=64, heads=2, layers=2, context=32))
    return Task(model, library_windows(batch_size=8, length=32).train, next_byte_loss)


def images() -> Task:
    """Convolutions, of which those of 1x1 can be lowered; the loss goes to almost nothing in 2000 steps."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    return Task(model, digits(batch_size=32).train, class_loss)


def regression() -> Task:
    x = torch.randn(4096, 32)
    y = torch.sin(x[:, :8]) + 0.1 * torch.randn(4096, 8)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 8),
    )  # fmt: skip
    return Task(model, ExampleBatches(x, y, batch_size=64, seed=0), F.mse_loss)


TASKS = {"text": text, "images": images, "regression": regression}


@pytest.mark.parametrize(
    ("name", "budget", "steps"),
    [
        ("text", "loose", 160),
        ("images", "usual", 120),
        ("regression", "loose", 300),
        *(pytest.param(name, budget, 2000, marks=pytest.mark.stress) for name in TASKS for budget in BUDGETS),
    ],
)
def test_a_healthy_run_meets_no_guard_and_no_alarm(name: str, budget: str, steps: int) -> None:
    torch.manual_seed(0)
    task = TASKS[name]()
    probe_every = 8 if steps < 1000 else 16
    live = AdaptivePrecision(
        AdaptiveSettings(recipes=("tensor", "row"), warm_up=50, probe_every=probe_every, share=1.0, **BUDGETS[budget])
    )
    trainer = MixedPrecisionTrainer(
        task.model,
        "bf16",
        loss_fn=task.loss_fn,
        callbacks=[live],
        emulate=True,
        seed=0,
        progress=False,
        statistics_every=4,
    )
    trainer.fit(task.data, epochs=steps, max_steps=steps)
    guarded = [str(decision) for decision in live.decisions if decision.reason is Reason.GUARDED]
    assert not guarded
    assert not trainer.monitor.alarms, [str(alarm) for alarm in trainer.monitor.alarms]
    assert trainer.steps_applied == steps
    assert live.controller is not None
    lowered = {decision.layer for decision in live.decisions if decision.new in ("tensor", "row")}
    assert lowered
    if budget == "loose":
        assert all(state.recipe != "bf16" for state in live.controller.states.values())
