"""What `deepseek-mp profile` was asked: its options, and which of them mean nothing for a metric."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision.planning import NOISE_BUDGET, SMALL_LOSS
from deepseek_mp.profiler.profiler import BATCHES

_OF_A_LOSS = {
    "budget": "--budget",
    "noise_budget": "--noise-budget",
    "batches": "--batches",
    "verify": "--verify",
    "by_role": "--by-role",
    "emulate": "--emulate",
    "timed": "--no-time",
    "data": "--no-data",
    "resume": "--resume",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """The options of the command."""

    recipes: tuple[str, ...] | None = None
    budget: float = SMALL_LOSS
    noise_budget: float = NOISE_BUDGET
    batches: int = BATCHES
    verify: int = 0
    by_role: bool = False
    emulate: bool = False
    timed: bool = True
    data: bool = True
    resume: Path | None = None
    device: str | None = None
    seed: int = 0

    def check_for_metric(self) -> None:
        """`ConfigError` naming the options that a metric would ignore."""
        plain = Question()
        unused = [option for name, option in _OF_A_LOSS.items() if getattr(self, name) != getattr(plain, name)]
        if unused:
            passed = f"{', '.join(unused)} for a target with a metric and no loader"
            allowed = "--recipes, --out, --plan, --device, --seed and --json"
            raise ConfigError(explain(passed, allowed, "Leave it out, or let the function return a loader"))
