"""Trains one stage of a progressive run: from the same start as the others, watched, and judged at its end."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.errors import ConfigError, LoaderError, NonFiniteError, explain
from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.records.runfile import RUN_FILE
from deepseek_mp.trainer.callbacks import Callback
from deepseek_mp.trainer.curves import Limits, Point, Verdict, judge, judge_baseline
from deepseek_mp.trainer.loop import MixedPrecisionTrainer
from deepseek_mp.trainer.position import check_loader, length, no_batch, random_state, set_random_state
from deepseek_mp.trainer.progressive_result import StageResult
from deepseek_mp.trainer.result import StepFacts
from deepseek_mp.trainer.setup import choose_device
from deepseek_mp.trainer.stages import Stage

log = logging.getLogger("deepseek_mp")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all stages have in common."""

    loader: Iterable[Any]
    steps: int
    limits: Limits
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None
    options: dict[str, Any]
    """Other arguments of the trainer."""
    run_dir: Path | None


class Watcher(Callback):
    """Keeps the curve of a run, and ends it at the first loss that is not finite where the baseline's was."""

    def __init__(self, baseline: Sequence[Point] | None) -> None:
        self.points: list[Point] = []
        self.times: list[float] = []
        self._fine = {point.step for point in baseline or () if math.isfinite(point.loss)}

    def on_step(self, trainer: MixedPrecisionTrainer, facts: StepFacts) -> None:
        point = Point.of(trainer.steps_attempted, facts)
        self.points.append(point)
        self.times.append(time.perf_counter())
        if facts.status == "skipped" and not math.isfinite(point.loss) and point.step in self._fine:
            message = f"the loss is {point.loss} at step {point.step}, where the baseline's is finite"
            raise NonFiniteError(message, first_bad_module=point.first_bad_module, skipped=1)

    @property
    def seconds_per_step(self) -> float | None:
        """Median time between the ends of two steps."""
        return median(b - a for a, b in pairwise(self.times)) if len(self.times) > 1 else None


class StageTraining:
    """Trains stages that start alike: with copies of one model, one random state, one order of data."""

    def __init__(self, setting: Setting, model: nn.Module) -> None:
        self.setting = setting
        self.model = model
        self.device = choose_device(model, setting.options.get("device"))
        self._start = random_state(setting.loader, self.device)
        loader: Any = setting.loader
        keeps_position = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._position = deepcopy(loader.state_dict()) if keeps_position else None

    def rewind(self) -> None:
        """Put the random state, the loader's own generators and its position back to where every stage starts."""
        loader: Any = self.setting.loader
        set_random_state(self._start, loader, self.device)
        if self._position is not None:
            loader.load_state_dict(deepcopy(self._position))

    def trainer(self, plan: str | PrecisionPlan, **changed: Any) -> MixedPrecisionTrainer:
        """A trainer of a copy of the model; `changed` replaces options that all stages have in common."""
        self.rewind()
        options = {**self.setting.options, "optimizer": self.setting.optimizer, **changed}
        if "loss_scale_policy" in options:
            options["loss_scale_policy"] = deepcopy(options["loss_scale_policy"])
        return MixedPrecisionTrainer(deepcopy(self.model), plan, **options)

    def first_batch(self) -> Any:
        """The loader's first batch; `LoaderError` if there is none, or another one when it is iterated again."""
        first, again = self._peek(), self._peek()
        if not same_batches(first, again):
            allowed = "the same batches each time that it is iterated from the same random state"
            change = "Draw from the generators of torch, NumPy or random, or seed your own in __iter__"
            raise LoaderError(explain("a train_loader that gave another first batch", allowed, change))
        return first

    def train(self, stage: Stage, baseline: Sequence[Point] | None = None) -> tuple[StageResult, nn.Module]:
        """Train a stage from the start; without a baseline it is the baseline. Gives its model too.

        Errors pass with the stage in a note; `NonFiniteError`, which says that the stage diverged, is a verdict.
        """
        started, watcher, diverged = time.monotonic(), Watcher(baseline), None
        run_dir = None if self.setting.run_dir is None else self.setting.run_dir / stage.name
        log.info("progressive, stage %s: %d layers lowered", stage.name, len(stage.lowered))
        with stage_named(f"stage {stage.name!r}"):
            trainer = self.trainer(stage.plan, run_dir=run_dir, callbacks=[watcher], pin=None)
            try:
                trainer.fit(self.setting.loader, self._epochs(), max_steps=self.setting.steps)
                if run_dir is not None:
                    trainer.callbacks = ()  # a run that goes on from here has no watcher, and must find none
                    trainer.save(run_dir)
            except NonFiniteError as error:
                diverged = str(error)
        verdict = self._verdict(watcher.points, baseline, diverged)
        result = StageResult(
            name=stage.name,
            plan=trainer.plan,
            lowered=stage.lowered,
            curve=tuple(watcher.points),
            verdict=verdict,
            seconds_per_step=watcher.seconds_per_step,
            seconds=time.monotonic() - started,
            run_dir=None if run_dir is None else str(run_dir),
        )
        log.info("progressive, stage %s: %s, %s", stage.name, "good" if verdict.good else "not good", verdict.reason)
        model = trainer.model
        del trainer
        gc.collect()  # a trainer's parts refer to each other, so its optimizer's memory would stay for the next stage
        return result, model

    def _verdict(self, points: Sequence[Point], baseline: Sequence[Point] | None, diverged: str | None) -> Verdict:
        found = judge_baseline(points) if baseline is None else judge(points, baseline, self.setting.limits)
        if found.good and diverged is not None:
            return Verdict(good=False, reason=diverged)
        return found

    def _epochs(self) -> int:
        """Epochs that hold the steps; each has one at least."""
        batches = length(self.setting.loader)
        window = self.setting.options.get("gradient_accumulation_steps", 1)
        return math.ceil(self.setting.steps / math.ceil(batches / window)) if batches else self.setting.steps

    def _peek(self) -> Any:
        self.rewind()
        for batch in self.setting.loader:
            return batch
        raise no_batch(0)


@contextmanager
def stage_named(name: str) -> Iterator[None]:
    """Whatever is raised inside says where in a progressive run it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in {name} of progressive")
        raise


def check_setting(setting: Setting) -> None:
    """`ConfigError` for values that no stage can be trained with, or that only the first one could."""
    check_loader(setting.loader, "train_loader")
    if isinstance(setting.loader, Iterator):
        change = "Pass a DataLoader, a list, or an object whose __iter__ begins anew"
        raise LoaderError(explain("a train_loader that can be iterated once", "one for every stage", change))
    if type(setting.steps) is not int or setting.steps < 1:
        raise ConfigError(explain(f"steps={setting.steps!r}", "a whole number from 1", "Pass the steps of each stage"))
    limits = {"tolerance": (setting.limits.tolerance, 0.0), "gradient_factor": (setting.limits.gradient_factor, 1.0)}
    for name, (value, least) in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (least < value < math.inf):
            raise ConfigError(explain(f"{name}={value!r}", f"a finite number above {least:g}", f"Change {name}"))
    for name, made in (("optimizer", setting.optimizer), ("scheduler", setting.options.get("scheduler"))):
        if made is not None and not callable(made):
            allowed = f"None, or a function that makes one: each stage has its own {name}"
            raise ConfigError(explain(f"{name}={made!r}", allowed, f"Pass a function, as for a trainer's {name}"))


def check_run_dirs(run_dir: Path | None, names: Sequence[str]) -> None:
    """`ConfigError` if a stage's directory holds a run already."""
    used = [run_dir / name for name in names if (run_dir / name / RUN_FILE).exists()] if run_dir is not None else []
    if used:
        raise ConfigError(explain(f"run_dir with a run in {used[0]}", "an unused run_dir", "Choose another run_dir"))


def same_batches(one: Any, other: Any) -> bool:
    """Whether two batches hold equal tensors in equal places; a NaN is equal to a NaN. Other values do not count."""
    mine, theirs = _tensors(one), _tensors(other)
    return len(mine) == len(theirs) and all(map(_equal, mine, theirs))


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_leaves(batch, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.eq(one, other).logical_or(one.ne(one).logical_and(other.ne(other))).all())
