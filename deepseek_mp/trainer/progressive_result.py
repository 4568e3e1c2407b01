"""What a progressive run found: its stages with curves and verdicts, and the model of the last good one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.report.amounts import UNKNOWN, percent, seconds, value
from deepseek_mp.report.table import paragraph, table
from deepseek_mp.trainer.curves import Point, Verdict, tail_mean

WIDTH = 110
"""Characters a line of the table."""
HEADING = ("stage", "lowered", "steps", "last loss", "worst", "at the end", "gradients", "step", "verdict", "reason")
"""`worst` and `at the end`: the smoothed loss against the baseline's; `gradients`: the median ratio of their norms."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """One stage: what it lowered, its curve, and what became of it."""

    name: str
    plan: PrecisionPlan
    """With its decisions, one a layer."""
    lowered: tuple[str, ...]
    """The layers that multiply in less than FP32."""
    curve: tuple[Point, ...]
    """Every step; of a stage that diverged, up to the step where it did."""
    verdict: Verdict
    seconds_per_step: float | None
    """Median, without the first step."""
    seconds: float
    """The whole stage."""
    run_dir: str | None

    @property
    def good(self) -> bool:
        return self.verdict.good

    @property
    def last_loss(self) -> float:
        """Mean of the finite losses among the last steps, as many as curves are smoothed over; NaN without any."""
        return tail_mean(self.curve)

    def to_json(self) -> dict[str, Any]:
        """Plain values; losses that are not finite as they are."""
        return {
            "name": self.name,
            "good": self.good,
            "verdict": self.verdict.to_json(),
            "lowered": list(self.lowered),
            "last_loss": self.last_loss,
            "seconds_per_step": self.seconds_per_step,
            "seconds": self.seconds,
            "run_dir": self.run_dir,
            "plan": self.plan.to_json(),
            "curve": [
                {"step": p.step, "loss": p.loss, "grad_norm": p.grad_norm, "scale": p.scale, "applied": p.applied}
                for p in self.curve
            ],
        }


@dataclass(frozen=True, kw_only=True)
class ProgressiveResult:
    """What `progressive` did; `print` gives the table of its stages.

    stages             those that were trained, the FP32 baseline first, each with its curve, plan and verdict
    model, plan        trained by the last good stage, and how; None if not even the baseline was good
    last_good          that stage, or None
    reason, complete   why it ended where it did, and whether the last stage that was asked for is good
    tolerance, layers  as asked for; and how many layers of the model multiply
    """

    stages: tuple[StageResult, ...]
    """Those that were trained: the baseline first, the last one is good or the one that was not."""
    model: nn.Module | None
    """Trained by the last good stage, and converted to its plan; None if not even the baseline was good."""
    reason: str
    """Why it ended where it did."""
    complete: bool
    """Whether the last stage that was asked for is good."""
    tolerance: float
    layers: int
    """Layers of the model that multiply."""

    @property
    def last_good(self) -> StageResult | None:
        """The last stage whose curve is good."""
        return next((stage for stage in reversed(self.stages) if stage.good), None)

    @property
    def plan(self) -> PrecisionPlan | None:
        """The plan of the last good stage."""
        return None if self.last_good is None else self.last_good.plan

    def to_json(self) -> dict[str, Any]:
        """Everything but the model."""
        return {
            "complete": self.complete,
            "reason": self.reason,
            "last_good": None if self.last_good is None else self.last_good.name,
            "tolerance": self.tolerance,
            "layers": self.layers,
            "stages": [stage.to_json() for stage in self.stages],
        }

    def __str__(self) -> str:
        rows = [_row(stage, self.layers) for stage in self.stages]
        last = "no model" if self.last_good is None else f"the model is that of stage {self.last_good.name!r}"
        return "\n".join([*table(HEADING, rows, WIDTH), *paragraph(f"{self.reason}; {last}", WIDTH)])


def _row(stage: StageResult, layers: int) -> Sequence[str]:
    verdict = stage.verdict
    ratio = verdict.gradient_ratio
    return (
        stage.name,
        f"{len(stage.lowered)} of {layers}",
        str(len(stage.curve)),
        value(stage.last_loss, 4),
        percent(verdict.worst_loss) if verdict.worst_loss is not None else "",
        percent(verdict.final_loss) if verdict.final_loss is not None else "",
        "" if ratio is None else f"{ratio:.3g}x",
        UNKNOWN if stage.seconds_per_step is None else seconds(stage.seconds_per_step),
        "good" if verdict.good else "not good",
        "" if verdict.good else verdict.reason,
    )
