"""Made-up peaks and times of a trainer's steps, by the ways to save memory that are in force, for tests on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.trainer.memory_trials import Gauge

MIB = 1 << 20


class Log(list[int]):
    """What a model notes of its forwards, trials too: a plain list would be put back after those."""


class MadeUp(Gauge):
    """Steps run as they are; what they take is said by tables, in MiB and seconds, by what is in force."""

    PLAIN = 1000.0

    def __init__(self, saves: dict[str, float], costs: dict[str, float] | None = None) -> None:
        self.saves, self.costs = saves, costs or {}
        self.seen: list[tuple[str, ...]] = []
        self.hold: Callable[[MixedPrecisionTrainer], None] | None = None

    def peak(self, step: Callable[[], object], trainer: MixedPrecisionTrainer) -> int:
        step()
        if self.hold is not None:
            self.hold(trainer)
        here = in_force(trainer)
        if not self.seen or self.seen[-1] != here:
            self.seen.append(here)
        return round(MIB * (self.PLAIN - sum(self.saves.get(name, 0.0) for name in here)))

    def seconds(self, step: Callable[[], object], trainer: MixedPrecisionTrainer) -> float:
        step()
        return 1.0 + sum(self.costs.get(name, 0.0) for name in in_force(trainer))


def in_force(trainer: MixedPrecisionTrainer) -> tuple[str, ...]:
    group: Any = trainer.optimizer.param_groups[0]
    bf16 = any(p.dtype is torch.bfloat16 for p in trainer.model.parameters())
    found = {
        "activations": trainer.config.activations is True,
        "fused": trainer.config.fused_loss == "auto",
        "8bit": group.get("states") == "8bit",
        "sr": bf16,
    }
    return tuple(name for name, there in found.items() if there)


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(size)
    return torch.randn(size, 64, generator=made), torch.randint(0, 3, (size,), generator=made)
