"""Mean loss and metrics over a loader, weighted so that unequal batches count by their size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, LoaderError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.nn.loss import LossFn
from deepseek_mp.trainer.ema import WeightAverage

Metric = Callable[[Any, Any], Tensor | float]
Inference = Callable[[], AbstractContextManager[None]]
"""Opens the region of the plan, without gradients."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and each module's own mode again after: parts frozen in eval mode stay so."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


LOSS = "loss"
"""The name of the mean loss among the metrics."""


@contextmanager
def inference(model: nn.Module, region: Inference, ema: WeightAverage | None) -> Iterator[Inference]:
    """Eval mode, with averaged weights if there are any; gives the region to call the model in."""
    with eval_mode(model), nullcontext() if ema is None else ema.applied():
        yield region


def check_metrics(metrics: object) -> None:
    """`ConfigError` unless the metrics are None or functions by name, none of which is the loss's."""
    if metrics is None or (isinstance(metrics, Mapping) and all(callable(m) for m in metrics.values())):
        if LOSS in (metrics or ()):
            passed = f"a metric of the name {LOSS!r}"
            raise ConfigError(explain(passed, "other names: the mean loss is given under this one", "Rename it"))
        return
    allowed = "None, or a mapping from names to functions (output, target) -> scalar"
    raise ConfigError(explain(f"metrics={metrics!r}", allowed, "Pass for example {'accuracy': accuracy}"))


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn | None,
    metrics: Mapping[str, Metric],
    device: torch.device,
    region: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """{'loss': mean over items, name: mean over samples}; the caller sets the mode, and `region` is around
    the model and its loss only: loaders and metrics compute in the format they are written for.

    Sums stay on the device until the end, so that evaluation runs without waiting per batch. A batch
    without items counts for nothing, whatever its loss is.
    """
    sums: dict[str, Tensor] = {}
    weights: dict[str, float | Tensor] = defaultdict(float)

    def count(name: str, value: Any, weight: int | Tensor) -> None:
        part = _scalar(name, value, torch.float64 if device.type == "cpu" else torch.float32)
        if isinstance(weight, Tensor):
            part = torch.where(weight > 0, part, 0.0)
        elif weight == 0:
            return
        part = part * weight
        sums[name] = sums[name] + part if name in sums else part
        weights[name] = weights[name] + weight

    for batch in loader:
        call = calls.move(calls.parse_batch(batch), device)
        samples = calls.batch_size(call)
        if not samples:
            continue
        with region():
            result = calls.run(model, call, loss_fn)
        count(LOSS, result.loss, result.items)
        for name, metric in metrics.items():
            count(name, metric(result.output, call.target), samples)
    if not float(weights[LOSS]):
        raise LoaderError(
            explain("a loader that gave nothing to evaluate", "a loader with data", "Check the data set and drop_last")
        )
    return {name: float(total) / float(weights[name]) for name, total in sums.items()}


def _scalar(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    """What a metric returned, as a 0-dim tensor; `ConfigError` if it is not one number."""
    number = isinstance(value, Tensor | Number)
    if not number or (isinstance(value, Tensor) and value.numel() != 1):
        passed = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        allowed = "a number or a scalar tensor, the mean over the batch"
        raise ConfigError(explain(f"metric {name!r} returned {passed}", allowed, "Reduce it, with .mean() for one"))
    return torch.as_tensor(value, dtype=dtype).reshape(())
