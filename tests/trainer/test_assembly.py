"""A stepper is built from a trainer's settings, and acts on nothing but what it is given."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionMonitor
from deepseek_mp.trainer.assembly import assemble_stepper, computation
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
    assert not isinstance(computation(made(), run.plan), FusedLoss)
