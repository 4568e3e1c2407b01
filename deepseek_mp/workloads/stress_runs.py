"""Runs a stress scenario under a policy and says whether the policy survived it.

A policy is broken if its numbers were lost, or if its loss on the validation examples is more than 1 % above that of
FP32 from the same weights on the same batches. The loss is taken twice: of the final weights in FP32, which tells
what training did to them, and in the policy's own precision under the stress, which tells how it would serve them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import nn

from deepseek_mp.errors import NonFiniteError
from deepseek_mp.precision import Decision, PrecisionPlan
from deepseek_mp.precision.recipes import PLAIN
from deepseek_mp.records.lines import to_plain
from deepseek_mp.workloads.data import Batches, Pair
from deepseek_mp.workloads.stress_hooks import Stress
from deepseek_mp.workloads.stress_policies import POLICIES, Policy, Trainee, mean_loss
from deepseek_mp.workloads.stress_scenarios import Scenario

LARGEST_GAP = 0.01
"""The largest relative loss over FP32's that a policy survives with."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a policy in a scenario. Losses are means over the validation examples."""

    scenario: str
    policy: str
    seed: int
    reference: float
    """Loss of FP32 at the end."""
    loss: float
    """Loss of the final weights in FP32, without the stress."""
    own_loss: float
    """Loss of the final weights in the policy's own precision, under the stress."""
    gave_up: bool
    """Too many steps in a row were skipped, and training ended there."""
    skipped: int
    """Steps that were not applied because something was not finite."""
    steps: int
    """Steps that were run, with those that were skipped."""
    lowered: float
    """Share of the linear layers that ran in a scaled recipe, over all steps: surviving without any is no feat."""
    decisions: tuple[tuple[int, Decision], ...]
    """Step and decision: at step 0 that of every layer, later of each one whose recipe has changed."""

    @property
    def gap(self) -> float:
        """Relative loss over FP32's, of the final weights in FP32."""
        return self.loss / self.reference - 1

    @property
    def own_gap(self) -> float:
        """Relative loss over FP32's, in the policy's own precision."""
        return self.own_loss / self.reference - 1

    @property
    def finite(self) -> bool:
        """Whether training came to its end, with weights whose loss is a number."""
        return not self.gave_up and math.isfinite(self.loss) and math.isfinite(self.own_loss)

    @property
    def broken(self) -> bool:
        """Whether the policy lost its numbers, or more of the loss than `LARGEST_GAP`."""
        return not (self.finite and max(self.gap, self.own_gap) <= LARGEST_GAP)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite as the words of `records.lines`."""
        found = {"gap": self.gap, "own_gap": self.own_gap, "finite": self.finite, "broken": self.broken}
        decisions = [{"step": step, **decision.to_json()} for step, decision in self.decisions]
        values: dict[str, Any] = to_plain({**vars(self), **found, "decisions": decisions}, "outcome")
        return values


def run(
    scenario: Scenario, policy: str | Policy, seed: int = 0, *, device: torch.device | str = "cpu", name: str = "custom"
) -> Outcome:
    """Train the scenario under the policy, and compare with FP32 from the same weights on the same batches.

    Args:
        scenario: one that `SCENARIOS` makes; FP32 is trained once for each object and seed.
        policy: a name in `POLICIES`, or a function that builds a trainer.
        seed: of the weights and of the order of the batches.
        device: where to train.
        name: what the outcome calls a policy that has no name.
    """
    where = torch.device(device)
    reference = _reference(scenario, seed, where)
    trained = reference if policy == "fp32" else _train(scenario, _built(policy), seed, where)
    return Outcome(
        scenario=scenario.name,
        policy=policy if isinstance(policy, str) else name,
        seed=seed,
        reference=reference.own_loss,
        loss=trained.loss,
        own_loss=trained.own_loss,
        gave_up=trained.gave_up,
        skipped=trained.skipped,
        steps=trained.steps,
        lowered=trained.lowered,
        decisions=tuple(trained.decisions),
    )


@dataclass(kw_only=True)
class _Trained:
    """A run while it is made, and its result."""

    loss: float = math.nan
    own_loss: float = math.nan
    gave_up: bool = True
    skipped: int = 0
    steps: int = 0
    lowered: float = 0.0
    decisions: list[tuple[int, Decision]] = field(default_factory=list)


def _built(policy: str | Policy) -> Policy:
    return POLICIES[policy] if isinstance(policy, str) else policy


@cache
def _reference(scenario: Scenario, seed: int, device: torch.device) -> _Trained:
    return _train(scenario, POLICIES["fp32"], seed, device)


def _train(scenario: Scenario, build: Policy, seed: int, device: torch.device) -> _Trained:
    data, found = scenario.data(seed), _Trained()
    trainee = build(scenario, scenario.model(seed), device)
    with scenario.stress(trainee.model, trainee.optimizer) as stress:
        with suppress(NonFiniteError):
            _steps(scenario, trainee, stress, data.train, found)
        found.skipped += found.gave_up  # the step that raised
        found.own_loss = trainee.evaluate(data.validation)["loss"]
    plain = scenario.model(seed).to(device)
    plain.load_state_dict(trainee.model.state_dict())
    found.loss = mean_loss(plain, data.validation, scenario.loss_fn)
    return found


def _steps(scenario: Scenario, trainee: Trainee, stress: Stress, batches: Batches, found: _Trained) -> None:
    """All steps; what is found is kept up to the one that raises."""
    plan, share = None, 0.0
    for step, batch in enumerate(islice(_endless(batches), scenario.steps)):
        stress.begin(step)
        found.steps += 1
        found.skipped += trainee.step(batch).status == "skipped"
        if trainee.plan is not plan:
            found.decisions += [(step, decision) for decision in _changed(plan, trainee.plan)]
            plan, share = trainee.plan, _lowered(trainee)
        found.lowered += share / scenario.steps
    trainee.settle()
    found.gave_up = False


def _lowered(trainee: Trainee) -> float:
    """Share of the linear layers that the plan has in a recipe with scales."""
    layers = {name for name, module in trainee.model.named_modules() if isinstance(module, nn.Linear)}
    scaled = {decision.layer for decision in trainee.plan.decisions if decision.new not in PLAIN}
    return len(layers & scaled) / len(layers)


def _changed(old: PrecisionPlan | None, new: PrecisionPlan) -> Iterator[Decision]:
    """The decisions of the new plan about layers that the old one had in another recipe."""
    before = {} if old is None else {(d.layer, d.role): d.new for d in old.decisions}
    for decision in new.decisions:
        if before.get((decision.layer, decision.role)) != decision.new:
            yield decision


def _endless(batches: Batches) -> Iterator[Pair]:
    while True:
        yield from batches
