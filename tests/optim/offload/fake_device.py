"""A fake device: copies happen only when somebody waits for them, and every event is written down.

Its memory is the CPU's. A copy that is read before it was waited for shows old numbers, and a source that is
overwritten too early sends wrong ones, every time and not by chance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.optim.offload import OffloadedOptimizer, OffloadSettings
from deepseek_mp.optim.offload.worker import ThreadWorker, without_gradients


@dataclass(eq=False)
class Mark:
    kind: str
    number: int
    targets: Sequence[Tensor]
    sources: Sequence[Tensor]
    done: bool = False


@dataclass
class FakeLanes:
    """Copies that are late. Down: the device's memory is kept by its allocator. Up: the host's is read late."""

    events: list[str] = field(default_factory=list)
    _one: threading.RLock = field(default_factory=threading.RLock)
    """Two threads may wait for a copy, which happens once."""
    _copies: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})

    def down(self, target: Tensor, source: Tensor) -> Mark:
        return self._start("down", [target], [source.clone()])

    def up(self, targets: Sequence[Tensor], sources: Sequence[Tensor], *, readers: Mark | None = None) -> Mark:
        assert readers is None or readers.kind == "now"
        return self._start("up", targets, sources)

    def now(self) -> Mark:
        return Mark("now", 0, (), (), done=True)

    def wait(self, mark: Mark) -> None:
        self.events.append(f"wait {mark.kind} {mark.number}")
        self._end(mark)

    def land(self, mark: Mark) -> None:
        self.events.append(f"land {mark.kind} {mark.number}")
        self._end(mark)

    def has_landed(self, mark: Mark) -> bool:
        return mark.done

    def _start(self, kind: str, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Mark:
        mark = Mark(kind, self._copies[kind], targets, sources)
        self._copies[kind] += 1
        self.events.append(f"{kind} {mark.number}")
        torch.autograd.graph.increment_version(targets)  # PyTorch counts a write when it is ordered
        return mark

    def _end(self, mark: Mark) -> None:
        with self._one:
            if not mark.done:
                for target, source in zip(mark.targets, mark.sources, strict=True):
                    target.data.copy_(source.data)
                mark.done = True


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Widths that are no multiples of a vector's, so that kernels have tails."""
    torch.manual_seed(3)
    layers = [nn.Linear(19, 33), nn.Tanh(), nn.Linear(33, 17), nn.LayerNorm(17), nn.Linear(17, 5)]
    return nn.Sequential(*layers).to(dtype)


def offloaded(
    model: nn.Module, lanes: FakeLanes | None = None, *, worker: Any = ThreadWorker, **options: Any
) -> OffloadedOptimizer:
    """In several chunks, on the fake device."""
    lanes = lanes or FakeLanes()
    settings = OffloadSettings(**{"chunk_bytes": 1500, **options})
    return OffloadedOptimizer(
        model.parameters(), lr=1e-2, model=model, settings=settings, lanes=lambda _: lanes, worker=worker
    )


def plain(model: nn.Module) -> torch.optim.AdamW:
    """What an offloaded optimizer of an FP32 model should be equal to."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def backward(*models: nn.Module, scale: float = 1.0) -> None:
    """One micro-batch, the same for all."""
    dtype = next(models[0].parameters()).dtype
    batch = torch.randn(8, 19, dtype=dtype)
    for model in models:
        (model(batch).square().mean() * scale).backward()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class NowWorker:
    """Runs a task when it is submitted."""

    def submit(self, task: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(without_gradients(task, *args))
        except Exception as error:  # noqa: BLE001 - it is handed on
            future.set_exception(error)
        return future


class LateWorker:
    """Runs tasks when somebody asks for a result, in their order."""

    def __init__(self) -> None:
        self._tasks: list[tuple[LateFuture, Callable[..., Any], Any]] = []

    def submit(self, task: Callable[..., Any], *args: Any) -> Future[Any]:
        future = LateFuture(self)
        self._tasks.append((future, task, args))
        return future

    def run_until(self, wanted: Future[Any]) -> None:
        while not wanted.done():
            future, task, args = self._tasks.pop(0)
            try:
                future.set_result(without_gradients(task, *args))
            except BaseException as error:  # noqa: BLE001 - it is handed on
                future.set_exception(error)


class LateFuture(Future):
    def __init__(self, worker: LateWorker) -> None:
        super().__init__()
        self._worker = worker

    def result(self, timeout: float | None = None) -> Any:
        self._worker.run_until(self)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._worker.run_until(self)
        return super().exception(timeout)


class InterruptedWorker(LateWorker):
    """Somebody presses Ctrl-C while he waits for a result, once for each time that it is armed."""

    armed = False

    def run_until(self, wanted: Future[Any]) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt("pressed")
        super().run_until(wanted)


WORKERS = (NowWorker, LateWorker, ThreadWorker)
