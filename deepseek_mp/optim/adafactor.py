"""Adafactor for parameters in FP32 and in BF16: a second moment of rows and columns instead of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.states import Moments, StateFormat
from deepseek_mp.optim.stored import Batch, StoredOptimizer

ROWS, COLUMNS, WHOLE = "row_var", "col_var", "variance"
"""Keys of the second moment, as PyTorch has them: of a matrix in two parts, or of every value of a vector."""


class Adafactor(StoredOptimizer):
    """A factored second moment ("Adafactor", arXiv 1804.04235), as `torch.optim.Adafactor`.

    Of a matrix [n, m] n + m numbers are kept, the means of the squared gradient over rows and columns; their product
    over the mean stands for the second moment. There is no first moment. An update is as large as the rate says in
    parts of the parameter's own root mean square, and is cut to a root mean square of `d`. Tensors of more than two
    dimensions count as matrices [first, all others]; PyTorch takes their last two dimensions.

    Args:
        params: parameters or groups.
        lr: the largest relative rate, a number or a tensor []; of step t it is min(lr, 1 / sqrt(t)).
        beta2_decay: the share of a new gradient in the second moment is t**beta2_decay.
        eps: the least root of a second moment (None: that of the type), and the least root mean square of a parameter,
            for its rate.
        d: the largest root mean square of an update, before the rate.
        weight_decay: times lr, taken off the weight.
        storage, seed: as in `AdamW`. Moments are FP32.

    Raises:
        ConfigError: an argument out of its range, or a parameter of another dtype than FP32, FP64 and BF16.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        storage: str = "bf16_kahan",
        seed: int = 0,
    ) -> None:
        rule = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        kept = {"storage": storage, "states": StateFormat.FP32.value, "seed": seed, "foreach": True}
        super().__init__(params, rule | kept)

    def _check_options(self, group: Mapping[str, Any]) -> None:
        smallest, least_size = group["eps"]
        numbers = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        for name, value in (*numbers.items(), ("eps", smallest or 0.0), ("eps", least_size)):
            if not isinstance(value, Tensor) and not value >= 0:
                raise ConfigError(explain(f"{name}={value!r}", "a number from 0", "Pass a positive number"))
        if not group["beta2_decay"] <= 0:
            passed, change = f"beta2_decay={group['beta2_decay']!r}", "Pass for example -0.8"
            raise ConfigError(explain(passed, "a number up to 0", change))
        if not group["d"] >= 1:
            raise ConfigError(explain(f"d={group['d']!r}", "a number from 1", "Pass for example 1.0"))
        if group["states"] != StateFormat.FP32:
            passed, change = f"states={group['states']!r} for Adafactor", "Leave states out: its moments are few"
            raise ConfigError(explain(passed, "'fp32'", change))

    def _moments(self, _group: Mapping[str, Any]) -> Moments:
        return {}

    def _new_state(self, parameter: Tensor, _group: Mapping[str, Any]) -> dict[str, Any]:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.dim() < 2:
            return {WHOLE: torch.zeros_like(parameter, dtype=dtype)}
        rows, columns = parameter.flatten(1).shape
        sizes = {ROWS: rows, COLUMNS: columns}
        return {key: torch.zeros(size, dtype=dtype, device=parameter.device) for key, size in sizes.items()}

    def _update(self, group: Mapping[str, Any], batch: Batch) -> None:
        counts = batch.advance()
        for index, (state, value, grad) in enumerate(zip(batch.states, batch.values, batch.grads, strict=True)):
            # A step that is skipped may be the first one, which has no root.
            step = state["step"].clamp_min(1.0) if counts is None else counts[index]
            _step(group, batch, state, value, grad, _number(step, value))


def _step(
    group: Mapping[str, Any], batch: Batch, state: Mapping[str, Tensor], value: Tensor, grad: Tensor, step: Tensor
) -> None:
    """Move one parameter; `step` is its number, a tensor []."""
    smallest, least_size = group["eps"]
    smallest = torch.finfo(value.dtype).eps if smallest is None else smallest
    lr = _number(group["lr"], value)
    rate = torch.minimum(lr, step.rsqrt()) * _rms(value).clamp_min(least_size)
    if group["weight_decay"]:
        value.mul_(batch.factor(1 - lr * group["weight_decay"]))
    second = _second_moment(state, grad, batch.amount(step ** group["beta2_decay"]), smallest)
    update = second.clamp_(min=smallest * smallest).rsqrt_().mul_(grad)
    cut = (_rms(update) / group["d"]).clamp_min(1.0)
    value.sub_(update.mul_(batch.amount(rate / cut)))


def _second_moment(state: Mapping[str, Tensor], grad: Tensor, share: Tensor, smallest: float) -> Tensor:
    """Let the gradient enter the second moment by its share, and give what stands for it, of the gradient's shape."""
    if WHOLE in state:
        return state[WHOLE].lerp_(grad.square(), share).clone()
    matrix = grad.flatten(1)
    rows, columns = state[ROWS], state[COLUMNS]
    for moment, along in ((rows, 1), (columns, 0)):
        moment.lerp_(torch.linalg.vector_norm(matrix, dim=along).square_().div_(matrix.shape[along]), share)
    return torch.outer(rows / rows.mean().clamp_min(smallest), columns).view(grad.shape)


def _number(number: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor [] beside another."""
    if isinstance(number, Tensor):
        return number.to(like.device, like.dtype).reshape(())
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _rms(x: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5
    return found
