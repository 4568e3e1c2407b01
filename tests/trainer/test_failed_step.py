"""A step that runs out of memory, wherever it does, can be tried again with less, and has counted for nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp import Callback, MixedPrecisionTrainer
from deepseek_mp.trainer.failed_step import _forget_backward

SIZE = 4
"""Samples that fit."""


class Hungry(torch.autograd.Function):
    """Runs out of memory above `SIZE` samples, in the forward or in the backward; what it is given is remembered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: str) -> Tensor:
        ctx.where = where
        if where == "forward" and x.shape[0] > SIZE:
            raise torch.OutOfMemoryError("out of memory")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.where == "backward" and grad.shape[0] > SIZE:
            raise torch.OutOfMemoryError("out of memory")
        return grad, None


class Model(nn.Module):
    """Buffers, random numbers, and an activation that `seen` remembers; gradients reach `last` before memory fails."""

    def __init__(self, where: str = "backward") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)
        self.where = where
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x)))
        x = Hungry.apply(x, self.where)
        self.seen.append(weakref.ref(x))
        return self.last(x)


def batch(size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs[:, :3].argmax(dim=1)


def trainer(model: nn.Module, **options: Any) -> MixedPrecisionTrainer:
    options = {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.1), "statistics_every": None} | options
    return MixedPrecisionTrainer(model, "fp32", device="cpu", seed=0, **options)


def everything(run: MixedPrecisionTrainer) -> dict[str, Any]:
    """What a step may move."""
    optimizer = [{k: v.tolist() for k, v in s.items()} for s in run.optimizer.state.values()]
    window = run.stepper.window
    return {
        "model": {name: value.tolist() for name, value in run.model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.tolist() for p in run.model.parameters()],
        "optimizer": optimizer,
        "steps": (run.steps_attempted, run.steps_applied, run.stepper.windows_opened),
        "window": (window.micro_batches, window.samples, window.largest, window.weight),
        "random": torch.get_rng_state().tolist(),
        "scale": run.scaler.state_dict(),
    }


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_smaller_batch_after_it_is_as_if_it_had_not_been(where: str, accumulation: int) -> None:
    runs = [trainer(Model(where), gradient_accumulation_steps=accumulation, max_grad_norm=1.0) for _ in range(2)]
    for run, tries in zip(runs, (True, False), strict=True):
        torch.manual_seed(4)
        for step in range(3):
            before = None
            for part in range(accumulation):
                if tries and before is None:
                    before = everything(run)
                    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
                        run.step(batch(SIZE + 2, step))
                    assert everything(run) == before
                run.step(batch(SIZE - part, 10 * step + part))
    assert everything(runs[0]) == everything(runs[1])
    assert runs[0].steps_applied == 3


def test_a_window_is_given_up_whole() -> None:
    runs = [trainer(Model(), gradient_accumulation_steps=2) for _ in range(2)]
    before = [p.clone() for p in runs[0].model.parameters()]
    runs[0].step(batch(3))
    state = everything(runs[1])
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        runs[0].step(batch(SIZE + 1))
    after = everything(runs[0])
    assert {**after, "random": 0} == {**state, "random": 0}
    assert all(torch.equal(*pair) for pair in zip(before, runs[0].model.parameters(), strict=True))


def test_checkpoints_are_due_as_if_it_had_not_been() -> None:
    run = trainer(Model(), checkpoint_every=2)
    run.step(batch(3))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run.step(batch(SIZE + 1))
    assert run.stepper.windows_opened == 1


def test_its_memory_is_free_when_the_caller_tries_again() -> None:
    run = trainer(Model("backward"))
    model = run.model
    try:
        run.step(batch(SIZE + 1))
    except torch.OutOfMemoryError:  # within, where the exception and its frames are still there
        assert [ref() for ref in model.seen] == [None]
        run.step(batch(SIZE))
    assert run.steps_applied == 1


class Branched(Model):
    """Memory fails in the branch that the backward comes to first; the other one, which saves `seen`, is ready then."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.seen.append(weakref.ref(x))
        return self.side(x) + Hungry.apply(self.last(x), self.where)


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
def test_what_its_backward_had_still_to_do_holds_no_memory(around: Callable[[], AbstractContextManager[Any]]) -> None:
    run = trainer(Branched())
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run.step(batch(SIZE + 1))
    assert [ref() for ref in run.model.seen] == [None]
    with around():
        _forget_backward()
    run.step(batch(SIZE))
    assert run.steps_applied == 1


def test_any_other_exception_keeps_its_frames_for_the_debugger() -> None:
    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            doubled = 2 * x
            raise ValueError(f"broken at {doubled.shape}")

    with pytest.raises(ValueError, match="broken") as caught:
        trainer(Broken()).step(batch(3))
    assert "doubled" in caught.tb.tb_frame.f_globals or "doubled" in caught.traceback[-1].frame.f_locals


@pytest.mark.parametrize("message", ["NPU out of memory. Tried to allocate", "CUBLAS_STATUS_ALLOC_FAILED in cublas"])
def test_errors_of_other_devices_free_memory_too(message: str) -> None:
    class Other(Model):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if x.shape[0] > SIZE:
                raise RuntimeError(message)
            return out

    run = trainer(Other())
    try:
        run.step(batch(SIZE + 1))
    except RuntimeError:
        assert [ref() for ref in run.model.seen] == [None]


class HalfMade(torch.optim.AdamW):
    """Runs out of memory while it makes its state, at the place that it is told."""

    fails_at: int | None = None

    def _init_group(self, group: Any, *lists: Any) -> Any:
        original, made = torch.zeros_like, []

        def zeros_like(*args: Any, **kwargs: Any) -> Tensor:
            made.append(1)
            if len(made) == self.fails_at:
                raise torch.OutOfMemoryError("no room for the state")
            return original(*args, **kwargs)

        torch.zeros_like = zeros_like
        try:
            return super()._init_group(group, *lists)
        finally:
            torch.zeros_like = original


@pytest.mark.parametrize("fails_at", [1, 2, 3, 8])
def test_memory_that_fails_for_the_optimizer_s_state_leaves_none_half_made(fails_at: int) -> None:
    runs = [trainer(Model(), optimizer=lambda params: HalfMade(params, lr=0.1)) for _ in range(2)]
    torch.manual_seed(4)
    before = everything(runs[0])
    runs[0].optimizer.fails_at = fails_at
    with pytest.raises(torch.OutOfMemoryError, match="no room for the state"):
        runs[0].step(batch(SIZE))
    assert everything(runs[0]) == before
    runs[0].optimizer.fails_at = None
    for run in runs:
        torch.manual_seed(4)
        run.step(batch(SIZE))
    assert everything(runs[0]) == everything(runs[1])


class HalfDone(torch.optim.SGD):
    """Runs out of memory when it has written to the first of its parameters."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise torch.OutOfMemoryError("out of memory")
        return super().step(closure)


def test_an_optimizer_that_had_begun_to_write_is_told_of() -> None:
    run = trainer(Model(), optimizer=lambda params: HalfDone(params, lr=0.1))
    run.step(batch(SIZE))
    run.optimizer.fails = True
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught:
        run.step(batch(SIZE))
    note, _ = caught.value.__notes__
    assert "had begun to change its parameters" in note
    assert "Load a checkpoint" in note


def test_one_that_had_not_is_not() -> None:
    run = trainer(Model("forward"))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught:
        run.step(batch(SIZE + 1))
    assert "had begun" not in "".join(caught.value.__notes__)


def test_callbacks_are_told_of_steps_that_were_made_only() -> None:
    class Counting(Callback):
        started = finished = 0

        def on_step_start(self, trainer: Any, batch: Any) -> None:
            self.started += 1

        def on_step(self, trainer: Any, facts: Any) -> None:
            self.finished += 1

    counting = Counting()
    run = trainer(Model(), callbacks=[counting])
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run.step(batch(SIZE + 1))
    run.step(batch(SIZE))
    assert (counting.started, counting.finished) == (2, 1)


def test_a_failed_first_step_leaves_the_monitor_to_count_the_next() -> None:
    run = trainer(Model())
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run.step(batch(SIZE + 1))
    run.step(batch(SIZE))
    straight = trainer(Model())
    straight.step(batch(SIZE))
    assert run.stepper.flops == straight.stepper.flops


class Twice(Model):
    """Uses a layer twice: the first step casts it twice, later ones once, which adds its gradients up otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.again(self.again(x).sin()))

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4)


def test_a_failed_first_step_leaves_the_next_its_bits() -> None:
    tried, other = (MixedPrecisionTrainer(Twice(), "bf16", device="cpu", optimizer=torch.optim.SGD) for _ in range(2))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        tried.step(batch(2 * SIZE))
    for run in (tried, other):
        torch.manual_seed(2)
        run.step(batch(SIZE))
    assert all(map(torch.equal, tried.model.parameters(), other.model.parameters()))
