"""The precision policies that the stress scenarios are run on, and the one loop that trains pure BF16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from deepseek_mp.controller import AdaptiveSettings
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer import AdaptivePrecision, MixedPrecisionTrainer, StepFacts
from deepseek_mp.trainer.evaluation import eval_mode
from deepseek_mp.workloads.data import Batches, Pair
from deepseek_mp.workloads.stress_scenarios import Scenario


class Trainee(Protocol):
    """What a run needs of a trainer; `MixedPrecisionTrainer` has it."""

    model: nn.Module
    optimizer: Optimizer

    @property
    def plan(self) -> PrecisionPlan: ...

    def step(self, batch: Any) -> Any: ...

    def settle(self) -> None: ...

    def evaluate(self, loader: Any) -> dict[str, float]: ...


Policy = Callable[[Scenario, nn.Module, torch.device], Trainee]
"""Builds the trainer of a scenario for a model in fp32, whose classes and parameters it may change."""


def in_mode(mode: str, **options: Any) -> Policy:
    """The policy that trains in one mode of `MixedPrecisionTrainer` from the first step to the last."""

    def build(scenario: Scenario, model: nn.Module, device: torch.device) -> Trainee:
        return MixedPrecisionTrainer(
            model,
            mode,
            loss_fn=scenario.loss_fn,
            optimizer=scenario.optimizer,
            scheduler=lambda optimizer: LambdaLR(optimizer, scenario.schedule),
            emulate=True,
            device=device,
            progress=False,
            **options,
        )

    return build


def adaptive_settings(steps: int) -> AdaptiveSettings:
    """Settings of live precision at the pace of so short a run."""
    return AdaptiveSettings(
        recipes=("fp32", "tensor", "block"),
        objective="memory",
        warm_up=steps // 8,
        probe_every=max(1, steps // 64),
        decide_every=max(2, steps // 32),
        compare_every=max(4, steps // 8),
        patience=steps // 4,
    )


def adaptive(scenario: Scenario, model: nn.Module, device: torch.device) -> Trainee:
    """BF16 whose layers go down to FP8 and up to FP32 while training runs."""
    live = AdaptivePrecision(adaptive_settings(scenario.steps))
    return in_mode("bf16", callbacks=[live])(scenario, model, device)


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Each parameter's next larger value, in place."""
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, math.inf)))


def nudged(scenario: Scenario, model: nn.Module, device: torch.device) -> Trainee:
    """FP32 from weights that differ in their last bit: how far FP32 is from itself."""
    nudge(model)
    return in_mode("fp32")(scenario, model, device)


class PureBF16:
    """Parameters, gradients, optimizer states and activations in BF16, updates rounded to the nearest.

    `MixedPrecisionTrainer` refuses such parameters; this is the plain loop that many would write.
    """

    def __init__(self, scenario: Scenario, model: nn.Module, device: torch.device) -> None:
        self.model = model.to(device, torch.bfloat16)
        self.plan = PrecisionPlan.of("bf16")
        self.loss_fn, self.device = scenario.loss_fn, device
        self.optimizer = scenario.optimizer(self.model.parameters())
        self._scheduler = LambdaLR(self.optimizer, scenario.schedule)

    def step(self, batch: Any) -> StepFacts:
        """One step, skipped if a gradient is not finite."""
        inputs, target = (tensor.to(self.device) for tensor in batch)
        self.optimizer.zero_grad()
        loss = self.loss_fn(self.model(inputs.bfloat16()), target)
        loss.backward()
        norm = float(nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None))
        if not math.isfinite(norm):
            return StepFacts(status="skipped", loss=float(loss.detach()))
        self.optimizer.step()
        self._scheduler.step()
        return StepFacts(status="applied", loss=float(loss.detach()), grad_norm=norm)

    def settle(self) -> None:
        """Nothing is under way between steps."""

    def evaluate(self, loader: Batches) -> dict[str, float]:
        """The mean loss over the loader's examples."""
        return {"loss": mean_loss(self.model, loader, self.loss_fn)}


def mean_loss(model: nn.Module, batches: Iterable[Pair], loss_fn: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean over all examples, of a model in eval mode, on the device and in the type of its parameters."""
    weight = next(model.parameters())
    total, count = 0.0, 0
    with torch.no_grad(), eval_mode(model):
        for inputs, target in batches:
            loss = loss_fn(model(inputs.to(weight.device, weight.dtype)), target.to(weight.device))
            total, count = total + float(loss) * len(inputs), count + len(inputs)
    return total / count


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "fp32": in_mode("fp32"),
        "fp32_nudged": nudged,
        "bf16_amp": in_mode("bf16"),
        "fp16_amp": in_mode("fp16"),
        "fp8_tensor": in_mode("tensor"),
        "fp8_block": in_mode("block"),
        "pure_bf16": PureBF16,
        "adaptive": adaptive,
    }
)
"""By name."""
