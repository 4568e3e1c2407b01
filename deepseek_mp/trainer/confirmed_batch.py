"""What `find_batch_size` has seen go through, for the trainer's first step to go by, and for its errors to name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepseek_mp.costs.timing import is_out_of_memory
from deepseek_mp.nn import call as calls
from deepseek_mp.trainer.functions import mixed_formats
from deepseek_mp.trainer.memory_report import in_gib

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer


@dataclass(frozen=True, kw_only=True)
class ConfirmedBatch:
    """The largest batch that steps were made with, more than once."""

    samples: int
    measures: tuple[str, ...] = ()
    """Names of the ways to save memory that were in force."""
    peak_bytes: int | None = None
    """The most memory in tensors during those steps; None where that is not counted."""
    limit_bytes: int | None = None
    """What they were allowed, where the trainer has a budget."""

    def covers(self, batch: Any) -> bool:
        """Whether the batch has no more samples than that."""
        return calls.batch_size(calls.parse_batch(batch)) <= self.samples

    def __str__(self) -> str:
        peak = "" if self.peak_bytes is None else f", holding {in_gib(self.peak_bytes)}"
        ways = f" with {', '.join(self.measures)}" if self.measures else ""
        return f"find_batch_size saw steps of {self.samples} samples go through{ways}{peak}"


@contextmanager
def explained(trainer: MixedPrecisionTrainer, batch: Any) -> Iterator[None]:
    """What a step with the batch raises inside says more: what to change where memory ran out, or formats are mixed."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(_note(trainer.confirmed, batch))
            raise
        named = mixed_formats(error) if isinstance(error, RuntimeError) else None
        if named is None:
            raise
        raise named from error


def _note(known: ConfirmedBatch | None, batch: Any) -> str:
    said = f"A training step of {calls.batch_size(calls.parse_batch(batch))} samples ran out of memory. "
    if known is None:
        return said + "find_batch_size finds the largest batch that fits; memory='auto' takes what saves memory."
    if not known.covers(batch):
        return f"{said}{known}: give no more than that."
    return f"{said}{known}. These samples are larger than those it was given, or something else holds memory now."
