"""What a step and a whole fit report.

A `StepResult` is lazy: on an accelerator the outcome of a step is known only when the device has
done it, and asking waits for that. A loop that never asks never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from deepseek_mp.nn import Saturated
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.memory_report import MemoryReport

Status = Literal["applied", "accumulated", "skipped", "no_grads"]


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """The outcome of one call of `step`, on the host."""

    status: Status
    """'applied': the optimizer stepped. 'accumulated': the window is not full yet. 'skipped':
    something was not finite, or live precision took the step back. 'no_grads': there was nothing to
    learn from, no batch with items or no parameter of the optimizer that received a gradient. After the
    last two everything is as it was."""
    reason: str = ""
    """Why a step was not applied; empty when it was."""
    loss: float = float("nan")
    """Mean loss over the items of the window (of the micro-batch, when accumulated)."""
    scale: float = 1.0
    """The loss scale the gradients were computed with."""
    grad_norm: float | None = None
    """L2 norm of the unscaled gradients before clipping; None when there was no step."""
    first_bad_module: str | None = None
    """For a skipped step, the first module that produced a non-finite value when it was replayed."""
    saturated: tuple[Saturated, ...] = ()
    """Tensors with delayed scales that outgrew them in this step, so that values were cut."""


class StepResult:
    """Lazy view of `StepFacts`: reading any field waits for the device to finish the step."""

    def __init__(self, read: Callable[[], StepFacts]) -> None:
        self._read = read

    @property
    def facts(self) -> StepFacts:
        """All fields at once."""
        return self._read()

    @property
    def status(self) -> Status:
        """'applied', 'accumulated', 'skipped' or 'no_grads', see `StepFacts`."""
        return self.facts.status

    @property
    def reason(self) -> str:
        """Why the step was not applied; empty when it was."""
        return self.facts.reason

    @property
    def loss(self) -> float:
        """Mean loss over the items of the window, or of the micro-batch when the window is not full."""
        return self.facts.loss

    @property
    def scale(self) -> float:
        """The loss scale the gradients were computed with."""
        return self.facts.scale

    @property
    def grad_norm(self) -> float | None:
        """L2 norm of the unscaled gradients before clipping; None when there was no step."""
        return self.facts.grad_norm

    @property
    def first_bad_module(self) -> str | None:
        """For a skipped step, the first module that produced a non-finite value when it was replayed."""
        return self.facts.first_bad_module

    @property
    def saturated(self) -> tuple[Saturated, ...]:
        """Tensors with delayed scales that outgrew them in this step, so that values were cut."""
        return self.facts.saturated

    def __repr__(self) -> str:
        return f"StepResult({self.facts!r})"


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What `fit` did; `print` gives one line.

    epochs, steps_attempted, steps_applied    of the whole run, resumed parts included
    loss                                      mean training loss of the last epoch, over its applied steps
    plan                                      the plan in force at the end, with a decision for each layer
    history                                   a mapping for each epoch: 'loss', 'seconds', 'val_<name>' and more
    seconds                                   of this call
    memory                                    what was done to fit into the memory asked for, or None
    """

    epochs: int
    """Epochs finished over the whole run, resumed parts included."""
    steps_attempted: int
    steps_applied: int
    loss: float
    """Mean training loss of the last epoch, over its applied steps."""
    plan: PrecisionPlan
    history: tuple[dict[str, Any], ...] = field(default=())
    """Per epoch: 'epoch', 'loss', 'seconds', 'skipped', 'samples_per_second', and the validation's as 'val_<name>'."""
    seconds: float = 0.0
    memory: MemoryReport | None = None
    """What was done to fit into the memory asked for."""

    def __str__(self) -> str:
        skipped = self.steps_attempted - self.steps_applied
        saved = ", ".join(self.memory.taken) if self.memory else ""
        return (
            f"{self.epochs} epochs, {self.steps_applied} steps applied and {skipped} not, "
            f"loss {self.loss:.4g}, base format {self.plan.base.name}, {self.seconds:.1f} s"
            + (f", with {saved} for its memory" if saved else "")
        )
