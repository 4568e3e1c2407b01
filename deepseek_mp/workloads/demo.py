"""The demo: two small models on real data, each trained in FP32 and in `auto`, and compared.

The comparison is fair by construction: both runs start from the same weights, see the same batches
in the same order, and differ only in `precision_mode`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.backends import default_device
from deepseek_mp.backends.detect import as_device
from deepseek_mp.costs.memory import optimizer_tensors, peak_during
from deepseek_mp.errors import ConfigError, explain, suggest
from deepseek_mp.trainer import Callback, MixedPrecisionTrainer, StepFacts
from deepseek_mp.workloads.data import Data, digits, library_windows
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss
from deepseek_mp.workloads.resnet import class_loss, small_resnet

MODES = ("fp32", "auto")
LAST = 10
"""Steps averaged into the last loss, which for a single batch is noisy."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and its loss."""

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    steps: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: what came out, what it cost, and why it ran as it did."""

    task: str
    mode: str
    format: str
    memory_format: str
    reason: str
    operations: dict[str, int]
    """Operations of a sampled step by the format they really ran in."""
    fallbacks: dict[str, int]
    """Operations of that step that ran in a wider format than asked for, by reason."""
    steps: int
    first_loss: float
    last_loss: float
    validation_loss: float
    validation_accuracy: float
    step_ms: float
    """Median time of a step. What `auto` takes to decide is in `total_s` only."""
    peak_memory_mib: float | None
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs of one task, in the order of `MODES`."""

    title: str
    runs: tuple[Run, ...]

    @property
    def speedup(self) -> float:
        """FP32's time per step over that of `auto`."""
        return self.runs[0].step_ms / self.runs[1].step_ms


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found on a device."""

    device: str
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "device": self.device,
            "tasks": [
                {"title": c.title, "speedup": c.speedup, "runs": [asdict(run) for run in c.runs]}
                for c in self.comparisons
            ],
        }


class StepLog(Callback):
    """Loss and time of every step. The first interval holds the decision, and is not counted."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._stamps: list[float] = []

    def on_step(self, trainer: MixedPrecisionTrainer, facts: StepFacts) -> None:  # noqa: ARG002
        self._stamps.append(time.perf_counter())
        self.losses.append(facts.loss)

    @property
    def step_ms(self) -> float:
        """Median milliseconds between the ends of two steps."""
        return 1e3 * median(b - a for a, b in zip(self._stamps, self._stamps[1:], strict=False))


def tasks(*, quick: bool = False, seed: int = 0) -> dict[str, Task]:
    """The two tasks by name. `quick` has a few steps of small models, to see that everything runs."""
    width, config = (8, GPTConfig(width=32, layers=2, context=32)) if quick else (32, GPTConfig())
    steps = {"digits": 12, "text": 12} if quick else {"digits": 220, "text": 160}
    return {
        "digits": Task(
            title="ResNet on handwritten digits",
            model=lambda: small_resnet(width=width, seed=seed),
            data=lambda: digits(seed=seed),
            loss_fn=class_loss,
            steps=steps["digits"],
        ),
        "text": Task(
            title="GPT on the text of Python's library",
            model=lambda: byte_gpt(config, seed=seed),
            data=lambda: library_windows(batch_size=8, length=config.context, count=steps["text"], seed=seed),
            loss_fn=next_byte_loss,
            steps=steps["text"],
        ),
    }


def run_demo(
    *,
    only: str | None = None,
    quick: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> DemoResult:
    """Train each task in FP32 and in `auto` on the same batches and compare.

    Args:
        only: the name of one task; None runs all.
        quick: a few steps of small models.
        device: where to train; None: the best of this machine.
        seed: of weights and batches.
        progress: show progress bars on standard error; None: only on a terminal.

    Raises:
        ConfigError: unknown task, or scikit-learn is missing.
    """
    known = tasks(quick=quick, seed=seed)
    if only is not None and only not in known:
        raise ConfigError(explain(f"task {only!r}", ", ".join(known), f"Use one of these.{suggest(only, known)}"))
    place = default_device() if device is None else as_device(device)
    chosen = {name: task for name, task in known.items() if only in (None, name)}
    return DemoResult(
        device=str(place),
        comparisons=tuple(
            Comparison(
                title=task.title,
                runs=tuple(train(name, task, mode, place, seed=seed, progress=progress) for mode in MODES),
            )
            for name, task in chosen.items()
        ),
    )


def train(name: str, task: Task, mode: str, device: torch.device, *, seed: int, progress: bool | None) -> Run:
    """One run of one task."""
    started = time.perf_counter()
    log, data = StepLog(), task.data()
    trainer = MixedPrecisionTrainer(
        task.model(), mode, loss_fn=task.loss_fn, device=device, seed=seed, callbacks=[log], progress=progress
    )
    result = trainer.fit(data.train, epochs=math.ceil(task.steps / len(data.train)), max_steps=task.steps)
    usage = trainer.monitor.log_precision_usage()
    fallbacks = Counter[str]()
    for fallback in usage.fallbacks:
        fallbacks[fallback.reason.value] += fallback.count
    scores = trainer.evaluate(data.validation, metrics={"accuracy": accuracy})
    return Run(
        task=name,
        mode=mode,
        format=result.plan.base.name,
        memory_format=result.plan.memory_format,
        reason=next((str(decision) for decision in result.plan.decisions if not decision.layer), mode),
        operations={name: count.total for name, count in usage.formats.items()},
        fallbacks=dict(fallbacks),
        steps=result.steps_applied,
        first_loss=log.losses[0],
        last_loss=mean(log.losses[-LAST:]),
        validation_loss=scores["loss"],
        validation_accuracy=scores["accuracy"],
        step_ms=log.step_ms,
        peak_memory_mib=_peak_mib(trainer, data.train.batch(0, 0), device),
        total_s=time.perf_counter() - started,
    )


def accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """The share of targets that have the highest score: scores [..., classes], target [...] int64."""
    return (scores.argmax(dim=-1) == target).float().mean()


def _peak_mib(trainer: MixedPrecisionTrainer, batch: tuple[Tensor, Tensor], device: torch.device) -> float | None:
    """Peak memory of one more step, in MiB."""
    resident = [*trainer.model.parameters(), *trainer.model.buffers(), *optimizer_tensors(trainer.optimizer)]
    peak = peak_during(lambda: trainer.step(batch).loss, device, resident=resident)
    return None if peak is None else peak / 2**20
