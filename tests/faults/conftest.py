"""A small model with everything a step can leave behind, and ways to look at and to delay a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.controller import LossScaler
from deepseek_mp.controller.scaler import _fused_step


class Net(nn.Module):
    """Two blocks with a norm, and a buffer that every forward replaces by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.register_buffer("level", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.level = 0.9 * self.level + 0.1 * x.detach().float().mean(0)
        return self.head(x)


@pytest.fixture
def make_model() -> Callable[[], nn.Module]:
    """The model, with the same weights every time."""

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Net()

    return make


@pytest.fixture
def make_trainer(make_model: Callable[[], nn.Module]) -> Callable[..., MixedPrecisionTrainer]:
    """A trainer with a scheduler and an average of the weights; other arguments as the test says."""

    def make(mode: str = "fp32", policy: Any = 256.0, **options: Any) -> MixedPrecisionTrainer:
        options = {
            "optimizer": lambda params: torch.optim.AdamW(params, lr=0.01),
            "scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
            "ema_decay": 0.9,
            "device": "cpu",
            "emulate": True,
        } | options
        model = options.pop("model", None)
        return MixedPrecisionTrainer(make_model() if model is None else model, mode, policy, **options)

    return make


@pytest.fixture
def make_batches() -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """Different batches, the same at every call."""

    def make(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [
            (torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator))
            for _ in range(count)
        ]

    return make


@pytest.fixture
def state_of() -> Callable[[MixedPrecisionTrainer], dict[str, Any]]:
    """Copies of all that a step may change but the count of attempts, by name."""

    def state(trainer: MixedPrecisionTrainer) -> dict[str, Any]:
        trainer.settle()
        found: dict[str, Any] = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
        for index, entry in trainer.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
        found["groups"] = trainer.optimizer.state_dict()["param_groups"]
        found["gradients"] = [param.grad for param in trainer.model.parameters()]
        found |= {f"scaler.{key}": value for key, value in trainer.scaler.state_dict().items()}
        if trainer.scheduler is not None:
            found["scheduler"] = {k: v for k, v in trainer.scheduler.state_dict().items() if k != "lr_lambdas"}
        if trainer.ema is not None:
            found |= {f"average.{name}": value for name, value in trainer.ema.values.items()}
        return copy.deepcopy(found | {"applied": trainer.steps_applied})

    return state


@pytest.fixture
def assert_same() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Bit-identity of two states; `but` names what may differ."""

    def check(one: dict[str, Any], other: dict[str, Any], but: tuple[str, ...] = ()) -> None:
        assert one.keys() == other.keys()
        for name in one:
            if name in but:
                continue
            a, b = one[name], other[name]
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name

    return check


@pytest.fixture
def late_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator's way on a CPU: a fused kernel skips by itself, and the host learns of it one step later."""
    on_the_host = LossScaler._apply

    def apply(self: LossScaler, optimizers: Any, params: Any, grads: Any, total: Any, skip: Tensor) -> str | None:
        assert all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers), "use a fused optimizer"
        if self._is_first(optimizers, {id(p) for p in params}):
            return on_the_host(self, optimizers, params, grads, total, skip)
        for optimizer in optimizers:
            _fused_step(optimizer, total, skip)
        return None

    monkeypatch.setattr(LossScaler, "_apply", apply)
