"""Tries a candidate plan on the user's model: one recording forward, or whole steps that are timed.

Every try starts from the same buffers and random state, has the plan in force only while it lasts,
and gives its memory back. What a lower format makes the model raise rules that format out; what the
reference (FP32 as the model is) raises is the user's own error and propagates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import escape

import torch
from torch import Tensor, nn

from deepseek_mp.backends import Capabilities, autocast, math_mode
from deepseek_mp.costs.decide import Candidate, Failure, Trial
from deepseek_mp.costs.restore import Snapshot, release_memory
from deepseek_mp.costs.timing import is_out_of_memory, time_call
from deepseek_mp.costs.units import NARROW, UnitCall, record_units
from deepseek_mp.errors import PlanError
from deepseek_mp.nn import apply, fp32_arithmetic, revert, units
from deepseek_mp.nn.layout import layout_weight, memory_format_of
from deepseek_mp.precision import RECIPES, PrecisionPlan, Recipe, Rule
from deepseek_mp.precision.plan import MemoryFormat

FP16_LOSS_SCALE = 1024.0
"""Keeps the gradients of an FP16 trial out of the subnormals, which some devices handle slowly."""
MESSAGE_LENGTH = 300


@dataclass(kw_only=True)
class Recording:
    """What one forward in the reference and one in the first working 16-bit format showed."""

    calls: tuple[UnitCall, ...] = ()
    finite: bool | None = None
    """Whether the reference's loss is finite; None if that forward did not fit in memory."""
    failed: dict[str, tuple[Failure, str]] = field(default_factory=dict)
    """Formats that are ruled out already, with the message of the error."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model, the loss of its sample batch, and the state that every try starts from."""

    model: nn.Module
    run: Callable[[], Tensor]
    device: torch.device
    capabilities: Capabilities
    pins: Mapping[str, str | Recipe]
    emulate: bool
    snapshot: Snapshot
    kernels: str | None = None
    """Implementation of FP8 for the layers that the pins give it to; None: the best there is."""

    def candidates(self, formats: list[str]) -> tuple[list[Candidate], dict[str, str]]:
        """The candidates whose plan the model takes, the reference first, and why others are refused.

        The order is that of `formats`, in the memory format the model has; the other one doubles it
        where there are convolutions. `PlanError` of the first format if the model takes none.
        """
        refused: dict[str, PlanError] = {}
        for name in formats:
            try:
                with self._in_force(Candidate(format=name)):
                    pass
            except PlanError as error:
                refused[name] = error
        taken = [name for name in formats if name not in refused]
        if not taken:
            raise next(iter(refused.values()))
        layouts: tuple[MemoryFormat, ...] = ("contiguous",)
        if any(layout_weight(unit) is not None for unit in units(self.model).values()):
            layouts = ("contiguous", "channels_last")
            if memory_format_of(self.model) == "channels_last":
                layouts = ("channels_last", "contiguous")
        candidates = [Candidate(format=name, memory_format=layout) for layout in layouts for name in taken]
        return candidates, {name: str(error) for name, error in refused.items()}

    def plan(self, candidate: Candidate) -> PrecisionPlan:
        """The candidate as a plan, pins first."""
        around = RECIPES[candidate.format].region
        rules = tuple(Rule(pattern=escape(name), recipe=RECIPES[around]) for name in sorted(candidate.kept))
        plan = PrecisionPlan(base=RECIPES[candidate.format], rules=rules, memory_format=candidate.memory_format)
        return plan.with_pins(self.pins)

    def run_eagerly(self) -> Tensor:
        """`run` without compiled code, so that hooks on the layers see their calls."""
        with torch.compiler.set_stance("force_eager"):
            return self.run()

    def record(self, candidates: list[Candidate]) -> Recording:
        """The calls to units, as a 16-bit region makes them where one works, else as the reference does."""
        result = Recording()
        try:
            result.calls, loss = self._recorded(candidates[0])
            result.finite = math.isfinite(loss)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        for candidate in candidates[1:]:
            if candidate.format not in NARROW or candidate.memory_format != candidates[0].memory_format:
                continue
            try:
                calls, loss = self._recorded(candidate)
            except Exception as error:  # noqa: BLE001 - recorded: whatever it is, this format cannot run the model
                result.failed[candidate.format] = _failure(error)
                continue
            if not result.finite or math.isfinite(loss):
                result.calls = calls
                break
            result.failed[candidate.format] = (Failure.NOT_FINITE, "")
        return result

    def try_step(self, trial: Trial, *, reference: Candidate, finite: bool | None, budget_s: float) -> Trial:
        """The trial with the time of its whole step, or with the reason why there is none.

        `finite` says whether the reference's loss is: only then does a loss that is not count
        against the candidate.
        """
        started = time.perf_counter()
        losses: list[Tensor] = []
        try:
            with self._ready(trial.candidate, search=True):
                step = self._step(trial.candidate.format, losses)
                timing = time_call(step, self.device, budget_s=budget_s, min_runs=2)
            bad = finite and trial.candidate.format != reference.format and not math.isfinite(float(losses[0]))
            outcome = replace(trial, failure=Failure.NOT_FINITE) if bad else replace(trial, step_ms=timing.median_ms)
        except Exception as error:
            failure, detail = _failure(error)
            if failure is Failure.ERROR and trial.candidate == reference:
                raise
            outcome = replace(trial, failure=failure, detail=detail)
        release_memory(self.device)
        return replace(outcome, seconds=time.perf_counter() - started)

    def _recorded(self, candidate: Candidate) -> tuple[tuple[UnitCall, ...], float]:
        """The calls of one forward, and its loss."""
        losses: list[Tensor] = []

        def forward() -> None:
            with autocast(self.device, candidate.format):
                losses.append(self.run_eagerly().detach())

        with self._ready(candidate, search=False):
            calls = record_units(self.model, forward)
        return calls, float(losses[0])

    def _step(self, format: str, losses: list[Tensor]) -> Callable[[], None]:
        """Forward and backward in a region of the format; the first loss is kept."""
        scale = FP16_LOSS_SCALE if format == "fp16" else 1.0

        def step() -> None:
            with torch.enable_grad(), autocast(self.device, RECIPES[format].region, cache=True):
                loss = self.run()
            if not losses:
                losses.append(loss.detach())
            (loss if scale == 1.0 else loss.float() * scale).backward()
            self._drop_gradients()

        return step

    @contextmanager
    def _ready(self, candidate: Candidate, *, search: bool) -> Iterator[None]:
        """The state every try starts from, with the candidate's plan and FP32 arithmetic in force."""
        self.snapshot.restore()
        with (
            self._in_force(candidate) as plan,
            math_mode(self.device, fp32=fp32_arithmetic(plan), search=search),
        ):
            try:
                yield
            finally:
                self._drop_gradients()

    @contextmanager
    def _in_force(self, candidate: Candidate) -> Iterator[PrecisionPlan]:
        plan = self.plan(candidate)
        try:
            yield apply(self.model, plan, emulate=self.emulate, kernels=self.kernels, capabilities=self.capabilities)
        finally:
            revert(self.model)

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def _failure(error: Exception) -> tuple[Failure, str]:
    """What an exception says about a candidate, without keeping the exception and its frames alive."""
    if is_out_of_memory(error):
        return Failure.DOES_NOT_FIT, ""
    text = f"{type(error).__name__}: {error}"
    return Failure.ERROR, text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."
