"""A stepper is built from a trainer's settings, and acts on nothing but what it is given."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionMonitor
from deepseek_mp.nn.call import parse_batch
from deepseek_mp.trainer import fused_loss
from deepseek_mp.trainer.assembly import assemble_stepper, computation, computation_anew
from deepseek_mp.trainer.budget import Budgeted
from deepseek_mp.trainer.compressed import Compressed
from deepseek_mp.trainer.fused_loss import FusedLoss
from deepseek_mp.trainer.result import StepFacts


def made(**options: object) -> MixedPrecisionTrainer:
    torch.manual_seed(0)
    return MixedPrecisionTrainer(nn.Linear(4, 3), "fp32", device="cpu", **options)  # type: ignore[arg-type]


def test_a_second_stepper_makes_the_trainer_s_steps_and_counts_none() -> None:
    run = made(gradient_accumulation_steps=2, max_grad_norm=0.5)
    seen: list[StepFacts] = []
    with PrecisionMonitor(run.model, sample_every=None) as monitor:
        stepper = assemble_stepper(
            run,
            run.plan,
            compute=computation(run, run.plan),
            scaler=deepcopy(run.scaler),
            monitor=monitor,
            finished=lambda facts, window: seen.append(facts),
        )
        batch = torch.randn(5, 4), torch.randint(0, 3, (5,))
        assert [stepper.run(batch).status for _ in range(2)] == ["accumulated", "applied"]
    assert stepper.max_grad_norm == 0.5
    assert [facts.status for facts in seen] == ["applied"]
    assert (run.steps_attempted, run.stepper.windows_opened) == (0, 0)


def test_the_computation_is_fused_where_the_trainer_is_to() -> None:
    run = made(fused_loss="auto")
    assert isinstance(computation(run, run.plan), FusedLoss)
    assert not isinstance(computation(made(fused_loss=False), run.plan), FusedLoss)
    by_itself = made()
    compute = computation(by_itself, by_itself.plan)
    assert isinstance(compute, FusedLoss)
    compute(parse_batch((torch.randn(5, 4), torch.randint(0, 3, (5,)))))
    assert compute.why, "scores of so few classes are left alone"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_a_computation_anew_has_decided_nothing_and_runs_the_same() -> None:
    options = {"fused_loss": True, "activations": True, "activation_memory_budget": 0.01}
    run = MixedPrecisionTrainer(Two(), "fp32", device="cpu", **options)  # type: ignore[arg-type]
    run.step((torch.randn(5, 4), torch.randint(0, 3, (5,))))
    used: Any = run.stepper.compute
    anew: Any = computation_anew(run, run.plan, used)
    assert used.choice is not None
    assert used.run.run.layer is run.model.head
    assert [type(one) for one in (anew, anew.run, anew.run.run)] == [Budgeted, Compressed, FusedLoss]
    assert anew.choice is None
    assert anew.run.run.layer is None
    assert anew.run.run.run is used.run.run.run


def test_blocks_are_measured_without_the_scores_that_a_step_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the largest tensor of a language model: a batch that fits without them would not be measured."""
    run = MixedPrecisionTrainer(Two(), "fp32", device="cpu", fused_loss=True, activation_memory_budget=0.01)
    rows: list[int] = []
    kind: Any = type(run.model.head)
    original = kind.forward

    def forward(layer: Any, x: torch.Tensor) -> Any:
        if layer is run.model.head:
            rows.append(len(x))
        return original(layer, x)

    monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(fused_loss, "COMPARED_ROWS", 2)
    run.step((torch.randn(50, 4), torch.randint(0, 3, (50,))))
    assert run.recomputed_blocks is not None
    assert rows == [2]
