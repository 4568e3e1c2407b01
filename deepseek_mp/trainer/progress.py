"""Progress on a terminal: one line for what is being measured, one bar per epoch."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

REFRESH_SECONDS = 0.5


class Progress:
    """Shows progress, or nothing at all.

    Args:
        shown: True or False; None shows it only if standard error is a terminal.
    """

    def __init__(self, shown: bool | None) -> None:
        self._bar: Bar | None = None
        self._task: Any = None
        self._last = 0.0
        if sys.stderr.isatty() if shown is None else shown:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, text: str, share: float) -> None:
        """A stage of measuring and the share of it that is done, from 0 to 1."""
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task(text, total=100)
        self._bar.update(self._task, description=text, completed=round(100 * share))

    def epoch(self, epoch: int, epochs: int | None, batches: int | None) -> None:
        """A new epoch of `batches` batches begins; None: how many epochs, or batches, is unknown."""
        if self._bar is None:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(f"epoch {epoch + 1}{f'/{epochs}' if epochs else ''}", total=batches)

    def advance(self, trainer: MixedPrecisionTrainer) -> None:
        """One more batch. The loss shown is that of the last settled step, so nothing waits for it."""
        if self._bar is None:
            return
        self._bar.advance(self._task)
        now = time.monotonic()
        if now - self._last >= REFRESH_SECONDS:
            self._last = now
            loss, skipped = trainer.recorder.running_loss, trainer.steps_attempted - trainer.steps_applied
            note = f", {skipped} skipped" if skipped else ""
            self._bar.update(self._task, description=f"epoch {trainer.position.epoch + 1}: loss {loss:.4f}{note}")
