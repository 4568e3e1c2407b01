"""What training changes is put back bit for bit, objects included, whatever happened in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.errors import BatchError
from deepseek_mp.nn.delayed import scales_of
from deepseek_mp.optim import AdamW
from deepseek_mp.trainer.kept_state import kept_state


def trained(optimizer: Any, mode: str = "fp32", width: int = 16) -> MixedPrecisionTrainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width), nn.Linear(width, 16))
    run = MixedPrecisionTrainer(model, mode, device="cpu", optimizer=optimizer, emulate=True, statistics_every=None)
    for _ in range(2):
        run.step(batch(width))
    return run


def batch(width: int = 16) -> Any:
    return torch.randn(6, width), torch.randint(0, 16, (6,))


def values(run: MixedPrecisionTrainer) -> dict[str, Any]:
    scales = [part for found in scales_of(run.model) for part in found.tensors().values()]
    return {
        "model": [value.tolist() for value in run.model.state_dict().values()],
        "state": [{k: (id(v), v.tolist()) for k, v in s.items()} for s in run.optimizer.state.values()],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups],
        "scales": [part.tolist() for part in scales],
        "random": torch.get_rng_state().tolist(),
    }


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "rate in a tensor": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1), fused=True),
    "stored": lambda params: AdamW(params, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_are_taken_back(optimizer: Any) -> None:
    run = trained(optimizer)
    before = values(run)
    with kept_state(run):
        for _ in range(3):
            run.step(batch())
        run.optimizer.param_groups[0]["lr"] *= 0.5
        assert values(run) != before
    assert values(run) == before


class Counting(torch.optim.Optimizer):
    """Keeps what it has seen in attributes, and steps by another optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.steps, self.norm, self.norms = 0, torch.zeros(()), [torch.ones(())]
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.steps += 1
        for parameter, value in self.slow.items():
            value.lerp_(parameter, 0.5)
            self.norm += value.norm()
        self.norms.append(self.norm.clone())


def test_what_an_optimizer_keeps_in_attributes_is_taken_back() -> None:
    run = trained(Counting)
    optimizer: Any = run.optimizer

    def held() -> Any:
        momenta = [state["momentum_buffer"].tolist() for state in optimizer.inner.state.values()]
        slow = [value.tolist() for value in optimizer.slow.values()]
        return optimizer.steps, optimizer.norm.tolist(), list(map(float, optimizer.norms)), slow, momenta

    before = held()
    with kept_state(run):
        run.step(batch())
        run.settle()
        assert all(now != then for now, then in zip(held(), before, strict=True))
    assert held() == before


class Several(torch.optim.Optimizer):
    """Steps by optimizers that it has in a container, and that know it."""

    def __init__(self, params: Any, container: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        matrices = [p for p in self.param_groups[0]["params"] if p.dim() == 2]
        vectors = [p for p in self.param_groups[0]["params"] if p.dim() < 2]
        self.inner = container(torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(vectors, lr=0.1))
        for one in self.all():
            one.outer = self

    def all(self) -> list[Any]:
        return list(self.inner.values() if isinstance(self.inner, dict) else self.inner)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.all():
            one.step()


@pytest.mark.parametrize("container", [lambda *all: list(all), lambda *all: all, lambda *all: dict(enumerate(all))])
def test_what_several_inner_optimizers_keep_is_taken_back(container: Any) -> None:
    run = trained(lambda params: Several(params, container))
    optimizer: Any = run.optimizer

    def held() -> Any:
        return [{k: v.tolist() for k, v in s.items()} for one in optimizer.all() for s in one.state.values()]

    before = held()
    assert len(before) == 8
    with kept_state(run):
        run.step(batch())
        run.settle()
        assert held() != before
    assert held() == before


def test_delayed_scales_are_taken_back() -> None:
    run = trained(OPTIMIZERS["sgd"], "delayed", width=32)
    before = values(run)
    assert before["scales"]
    with kept_state(run):
        run.step((1e3 * torch.randn(6, 32), torch.randint(0, 16, (6,))))
        assert values(run)["scales"] != before["scales"]
    assert values(run) == before


def test_state_that_is_new_is_dropped_and_state_that_went_comes_back() -> None:
    run = trained(OPTIMIZERS["adamw"])
    before = values(run)
    first, *rest = run.optimizer.state
    extra = nn.Parameter(torch.zeros(1))
    with kept_state(run):
        run.optimizer.state[first].clear()
        run.optimizer.state[rest[0]]["more"] = torch.ones(1)
        run.optimizer.state[extra]["step"] = torch.ones(1)
    assert values(run) == before


def test_an_exception_takes_them_back_too() -> None:
    run = trained(OPTIMIZERS["adamw"])
    before = values(run)
    with pytest.raises(BatchError, match="a batch that is str"), kept_state(run):
        MixedPrecisionTrainer.fit(run, [batch(), "no batch"])
    assert values(run) == before


def test_gradients_are_set_aside() -> None:
    run = trained(OPTIMIZERS["adamw"])
    gradient = run.model[0].weight.grad = torch.ones(16, 16)
    with kept_state(run):
        assert run.model[0].weight.grad is None
    assert run.model[0].weight.grad is gradient
