"""Mean loss and metrics over a loader, weighted so that unequal batches count by their size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.errors import LoaderError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.nn.loss import LossFn

Metric = Callable[[Any, Any], Tensor | float]


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn | None,
    metrics: Mapping[str, Metric],
    device: torch.device,
) -> dict[str, float]:
    """{'loss': mean over items, name: mean over samples}; the caller sets mode and region.

    Sums stay on the device until the end, so that evaluation runs without waiting per batch.
    """
    sums: dict[str, Tensor] = {}
    weights: dict[str, float | Tensor] = defaultdict(float)

    def count(name: str, value: Tensor | float, weight: int | Tensor) -> None:
        part = torch.as_tensor(value, dtype=torch.float64 if device.type == "cpu" else torch.float32) * weight
        sums[name] = sums[name] + part if name in sums else part
        weights[name] = weights[name] + weight

    seen = False
    for batch in loader:
        call = calls.move(calls.parse_batch(batch), device)
        samples = calls.batch_size(call)
        seen = True
        if not samples:
            continue
        result = calls.run(model, call, loss_fn)
        count("loss", result.loss, result.items)
        for name, metric in metrics.items():
            count(name, metric(result.output, call.target), samples)
    if not seen:
        raise LoaderError(
            explain("a loader that gave no batch to evaluate", "a loader with data", "Check the data set and drop_last")
        )
    return {name: float(total) / float(weights[name]) for name, total in sums.items()}
