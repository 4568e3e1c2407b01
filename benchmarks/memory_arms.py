"""The arms of the memory benchmark: PyTorch alone, and the trainer under named options.

A name is one of `BASELINES` or `OURS`. With -compiled model and loss are compiled, with -regional the trainer's
repeated blocks; -budget50 keeps half of what compiled code would keep; with -nudged the training starts from weights
that differ in their last bit, which tells how far an arm is from itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Protocol

import torch
from cases import Case, OptimizerFactory
from peers import AUTOCAST, HandLoop, Mode
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.optim import SGD, AdamW, set_storage
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.config import Compile
from deepseek_mp.workloads.stress_policies import nudge

BASELINES = {"fp32": Mode(format="fp32"), "bf16": Mode(format="bf16", channels_last=True)}
"""Only the models of images are put into channels_last."""
OURS: dict[str, dict[str, Any]] = {
    "ours-bf16": {"mode": "bf16", "fused_loss": False},
    "ours-auto": {"mode": "auto", "fused_loss": False},
    "ours-loss": {"mode": "bf16", "fused_loss": "auto"},
    "ours-activations": {"mode": "bf16", "fused_loss": False, "activations": True},
    "ours-8bit": {"mode": "bf16", "fused_loss": False, "states": "8bit"},
    "ours-weights": {"mode": "bf16", "fused_loss": False, "states": "8bit", "storage": "bf16_sr"},
    "ours-small": {"mode": "bf16", "fused_loss": "auto", "activations": True, "states": "8bit", "storage": "bf16_sr"},
    "ours-lean": {"mode": "bf16", "fused_loss": "auto", "states": "8bit", "storage": "bf16_sr"},
    "ours-lean-fp8": {"mode": "fp8", "fused_loss": "auto", "states": "8bit", "storage": "bf16_sr"},
}
"""Options of `MixedPrecisionTrainer` by arm, passed as they are but for three: `mode` names its precision, `states` how
the optimizer keeps its moments, `storage` how the weights of linear layers and convolutions are kept.
"""
ARMS = (*BASELINES, *OURS)
NAME = re.compile(r"(?P<base>.+?)(-budget(?P<budget>\d{1,2}))?(-(?P<compiled>compiled|regional))?(?P<nudged>-nudged)?")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm by its name: bf16, ours-auto, bf16-compiled, ours-lean-budget50-regional, bf16-nudged ..."""

    name: str
    base: str
    budget: float | None
    """`activation_memory_budget`."""
    compiled: Compile
    nudged: bool

    @classmethod
    def parse(cls, name: str) -> Arm:
        """`ValueError` for a name that is none."""
        found = NAME.fullmatch(name)
        if found is None or found["base"] not in ARMS or (found["base"] in BASELINES and found["budget"]):
            endings = "-budgetNN (ours), -compiled or -regional, -nudged"
            allowed = f"{', '.join(ARMS)}, each also with {endings}, in this order"
            raise ValueError(f"{name!r} is no arm. Allowed: {allowed}. Use one of these")
        how: dict[str | None, Compile] = {None: False, "compiled": True, "regional": "regional"}
        return cls(
            name=name,
            base=found["base"],
            budget=int(found["budget"]) / 100 if found["budget"] else None,
            compiled=how[found["compiled"]],
            nudged=bool(found["nudged"]),
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms of a comparison have in common."""

    case: Case
    optimizer: OptimizerFactory
    device: torch.device
    batches: Callable[[], Iterator[Any]]
    schedule: Callable[[Optimizer], LRScheduler] | None = None


class Loop(Protocol):
    """A training under way."""

    model: nn.Module

    @property
    def optimizer(self) -> Optimizer: ...

    def step(self) -> Any:
        """Train on the next batch."""

    def loss(self, outcome: Any) -> float:
        """The loss of a step, NaN if it was not applied, from what `step` returned. Waits for the device."""

    def settings(self) -> AbstractContextManager[object]:
        """The global settings that the loop runs under."""

    def predict(self, inputs: Tensor) -> Any:
        """The model's output in evaluation, in the arm's precision."""

    def about(self) -> dict[str, Any]:
        """What was chosen."""


def make_loop(arm: Arm, setting: Setting) -> Loop:
    """The arm's training, ready for its first step."""
    return HandArm(arm, setting) if arm.base in BASELINES else OurArm(arm, setting)


class HandArm:
    """A hand-written loop of PyTorch alone."""

    def __init__(self, arm: Arm, setting: Setting) -> None:
        case = _nudged(setting.case) if arm.nudged else setting.case
        mode = replace(
            BASELINES[arm.base],
            channels_last=BASELINES[arm.base].channels_last and case.images,
            compile=bool(arm.compiled),
            compile_loss=bool(arm.compiled) and case.loss_fn is not None,
        )
        self.hand = HandLoop(case, mode, setting.optimizer, setting.device)
        self.hand.batches = setting.batches()
        self.model = self.hand.model
        self.scheduler = setting.schedule(self.hand.optimizer) if setting.schedule else None

    @property
    def optimizer(self) -> Optimizer:
        return self.hand.optimizer

    def step(self) -> Tensor:
        loss = self.hand.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss

    def loss(self, outcome: Any) -> float:
        return float(outcome)

    def settings(self) -> AbstractContextManager[object]:
        return self.hand.flags()

    def predict(self, inputs: Tensor) -> Any:
        self.model.eval()
        dtype = AUTOCAST.get(self.hand.mode.format)
        device = self.hand.device.type
        with torch.no_grad(), torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            output = self.model(inputs)
        self.model.train()
        return output

    def about(self) -> dict[str, Any]:
        return {"mode": self.hand.mode.name}


class OurArm:
    """The trainer with the options of its name."""

    def __init__(self, arm: Arm, setting: Setting) -> None:
        case = _nudged(setting.case) if arm.nudged else setting.case
        options = dict(OURS[arm.base])
        mode: str = options.pop("mode")
        states, storage = options.pop("states", None), options.pop("storage", None)
        plan: str | PrecisionPlan = mode
        if mode != "auto":
            plan = replace(PrecisionPlan.of(mode), memory_format="channels_last" if case.images else "contiguous")
        values: dict[str, Any] = {
            "loss_fn": case.loss_fn,
            "optimizer": setting.optimizer if states is None else _stored(setting.optimizer, states),
            "scheduler": setting.schedule,
            "compile": arm.compiled,
            "activation_memory_budget": arm.budget,
            # A CPU without units for a format runs it all the same, to try the script.
            "emulate": mode != "auto" and setting.device.type == "cpu",
        }
        self.trainer = MixedPrecisionTrainer(
            case.model(), plan, device=setting.device, progress=False, **(values | options)
        )
        if storage is not None:
            for weight in _weights(self.trainer.model):
                set_storage(self.trainer.optimizer, weight, storage)
        self.batches = setting.batches()
        self.model = self.trainer.model
        self.options = OURS[arm.base]

    @property
    def optimizer(self) -> Optimizer:
        return self.trainer.optimizer

    def step(self) -> Any:
        return self.trainer.step(next(self.batches))

    def loss(self, outcome: Any) -> float:
        return float(outcome.loss) if outcome.status == "applied" else float("nan")

    def settings(self) -> AbstractContextManager[object]:
        return nullcontext()

    def predict(self, inputs: Tensor) -> Any:
        return self.trainer.predict(inputs)

    def about(self) -> dict[str, Any]:
        plan = self.trainer.plan
        whole = [decision.to_json() for decision in plan.decisions if not decision.layer]
        chosen = {"mode": plan.base.name, "memory_format": plan.memory_format, "decisions": whole}
        return {"options": self.options, **chosen}


def _stored(factory: OptimizerFactory, states: str) -> Callable[[Any], Optimizer]:
    """Makes the optimizer of `deepseek_mp.optim` that has the rule and the numbers of PyTorch's."""

    def make(parameters: Any) -> Optimizer:
        plain = factory(parameters)
        own: Any = {"AdamW": AdamW, "SGD": SGD}[type(plain).__name__]
        names = signature(own).parameters.keys() - {"foreach"}
        groups = [{key: value for key, value in group.items() if key in names} for group in plain.param_groups]
        return own(groups, states=states)  # type: ignore[no-any-return]

    return make


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Of linear layers and convolutions, but for those that an embedding reads too."""
    read = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found = {id(w): w for w in (layer.weight for layer in layers) if isinstance(w, nn.Parameter) and id(w) not in read}
    return list(found.values())


def _nudged(case: Case) -> Case:
    """The case from weights that differ in their last bit."""

    def model() -> nn.Module:
        built = case.model()
        with torch.no_grad():
            nudge(built)
        return built

    return replace(case, model=model)
