"""A classifier of a few numbers, its batches and its trainer, for tests of how its loss is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp import MixedPrecisionTrainer


class Classifier(nn.Module):
    """[N, 4] to [N, 7]; `after` is what becomes of the last layer's output."""

    def __init__(self, after: Any = lambda output: output, *, bias: bool = True) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 7, bias=bias)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.head(self.body(x).tanh()))


def batches(steps: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(steps, size, 4, generator=generator)
    labels = torch.randint(0, 7, (steps, size), generator=generator)
    labels[:, 0] = -100
    return list(zip(inputs, labels, strict=True))


def trainer(model: nn.Module, mode: str = "fp32", **options: Any) -> MixedPrecisionTrainer:
    options = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.5), "statistics_every": None} | options
    return MixedPrecisionTrainer(model, mode, device="cpu", seed=0, **options)


def train(run: MixedPrecisionTrainer, data: list[Any]) -> list[float]:
    return [run.step(batch).loss for batch in data]
