"""The epochs of a fit: every batch a step, and what is due between them and after each epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.evaluation import Metric
from deepseek_mp.trainer.position import length, no_batch
from deepseek_mp.trainer.progress import Progress
from deepseek_mp.trainer.result import FitResult

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """One call of `fit`, whose arguments were checked and whose checkpoint, if any, was loaded."""

    trainer: MixedPrecisionTrainer
    loader: Iterable[Any]
    epochs: int
    """Of the whole run, like `max_steps`."""
    max_steps: int | None
    val_loader: Iterable[Any] | None
    metrics: Mapping[str, Metric] | None
    shown: Progress

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run; None where the loader does not say how long it is and nothing else does."""
        batches = length(self.loader)
        if batches is None:
            return self.max_steps
        steps = self.epochs * -(-batches // self.trainer.config.gradient_accumulation_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def run(self) -> None:
        """Train until the run has seen its epochs, or applied its steps."""
        position = self.trainer.position
        while position.epoch < self.epochs and not self._reached():
            self._epoch()
            if position.batch == 0:  # the epoch is complete, not stopped by max_steps
                self._end_epoch()

    def result(self, seconds: float) -> FitResult:
        """What the run has done by now, this fit in so many seconds."""
        trainer = self.trainer
        return FitResult(
            epochs=trainer.position.epoch,
            steps_attempted=trainer.steps_attempted,
            steps_applied=trainer.steps_applied,
            loss=trainer.history[-1]["loss"] if trainer.history else trainer.recorder.running_loss,
            plan=trainer.plan if trainer.has_stepper else PrecisionPlan.of("fp32", trainer.config.pin),
            history=tuple(trainer.history),
            seconds=seconds,
            memory=trainer.memory,
        )

    def _epoch(self) -> None:
        """The rest of an epoch, or of `max_steps`; windows never cross its end."""
        trainer, position = self.trainer, self.trainer.position
        batches = length(self.loader)
        self.shown.epoch(position.epoch, self.epochs if self.max_steps is None else None, batches)
        trainer.recorder.start_epoch(continued=position.batch > 0)
        for index, batch in position.batches(self.loader):
            trainer.step(batch)
            if not trainer.stepper.window.micro_batches:
                position.stepped(index + 1)
            self.shown.advance(trainer)
            if self._checkpoint_due():
                self._save()
            if self._reached() and position.batch != batches:
                self._save()
                return
        if not position.batch:
            raise no_batch(position.epoch)
        if trainer.has_stepper and trainer.stepper.window.micro_batches:
            trainer.stepper.close()
        trainer.settle()
        trainer.history.append({"epoch": position.epoch, **trainer.recorder.epoch_summary()})
        position.next_epoch()

    def _end_epoch(self) -> None:
        trainer, entry = self.trainer, self.trainer.history[-1]
        if self.val_loader is not None:
            means = trainer.evaluate(self.val_loader, metrics=self.metrics)
            entry |= {f"val_{name}": value for name, value in means.items()}
        if isinstance(trainer.scheduler, ReduceLROnPlateau):
            trainer.scheduler.step(entry.get("val_loss", entry["loss"]))
        trainer.recorder.epoch(entry, last=trainer.position.epoch >= self.epochs or self._reached())
        for callback in trainer.callbacks:
            callback.on_epoch_end(trainer, entry["epoch"], entry)
        self._save()

    def _reached(self) -> bool:
        """Whether `max_steps` are applied, or the fit was stopped; waits for the device only when that may be so."""
        trainer = self.trainer
        if trainer.stopping:
            trainer.settle()
            return not (trainer.has_stepper and trainer.stepper.window.micro_batches)
        if self.max_steps is None:
            return False
        pending = 1 if trainer.has_stepper and trainer.stepper.unsettled else 0
        if trainer.steps_applied + pending >= self.max_steps:
            trainer.settle()
        return trainer.steps_applied >= self.max_steps

    def _checkpoint_due(self) -> bool:
        every, stepper = self.trainer.config.checkpoint_every, self.trainer.stepper
        return every is not None and not stepper.window.micro_batches and stepper.windows_opened % every == 0

    def _save(self) -> None:
        """Write a checkpoint, in a run that keeps any."""
        if self.trainer.recorder.run_dir is not None:
            self.trainer.save(self.trainer.recorder.run_dir)


@contextmanager
def unfinished_discarded(trainer: MixedPrecisionTrainer) -> Iterator[None]:
    """Whatever ends a fit early leaves no half-accumulated window behind."""
    try:
        yield
    except BaseException as error:
        if trainer.has_stepper:
            trainer.stepper.abandon()
        trainer.position.rewind(trainer.loader)
        trainer.recorder.ended_early(error)
        raise
