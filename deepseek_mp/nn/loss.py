"""The loss: checked to be one that can be trained on, and inferred from output and target if not given.

Inferred losses are a sum over items divided by their number, at least one: a batch without items, or
with every label ignored, has the loss 0 and zero gradients, not 0/0. The number comes back with the
loss, so that accumulation can weigh micro-batches of different sizes. They are computed in FP32 (FP64
for FP64 outputs) whatever the output's format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.errors import BatchError, explain

LossFn = Callable[[Any, Any], Tensor | tuple[Tensor, int | Tensor]]
"""(output, target) -> scalar, or (scalar, number of items it averages over)."""

IGNORED_LABEL = -100
"""A label that counts for nothing: PyTorch's and Hugging Face's convention."""

_OF_ELEMENTS = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, F.mse_loss, F.l1_loss,
    F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
)  # fmt: skip
_INFERRED = (
    "integer targets [N], [B, T] or [N, d...] with logits [N, C], [B, T, C] or [N, C, d...] (cross entropy), bool "
    "targets of the output's shape (binary cross entropy), floating targets of the output's shape (squared error)"
)


def infer_loss(output: Any, target: Any) -> tuple[str, LossFn]:
    """The name of the loss that output and target call for, and the loss.

    Logits [B, T, C] with targets [B, T] have their classes last, [N, C, d...] with [N, d...] second;
    where a shape reads both ways, three dimensions mean classes last (a sequence), more mean second
    (an image). `BatchError` where nothing fits.
    """
    if not (isinstance(output, Tensor) and output.is_floating_point() and isinstance(target, Tensor)):
        raise _no_loss(output, target)
    if target.dtype == torch.bool and target.shape == output.shape:
        return "binary_cross_entropy_with_logits", _binary_cross_entropy
    if target.is_floating_point() and target.shape == output.shape:
        return "mse", _squared_error
    if is_integer(target) and output.dim() >= 2:
        if classes_last(output, target):
            return "cross_entropy", _cross_entropy_last
        if _classes_second(output, target):
            return "cross_entropy", _cross_entropy_second
    raise _no_loss(output, target)


def classes_last(output: Tensor, target: Tensor) -> bool:
    """Whether whole-number targets [...] are read as the classes of logits [..., C]."""
    last = output.shape[:-1] == target.shape
    return last and (output.dim() <= 3 or not _classes_second(output, target))


def _classes_second(output: Tensor, target: Tensor) -> bool:
    return (output.shape[0], *output.shape[2:]) == tuple(target.shape)


def is_integer(target: Tensor) -> bool:
    """Whether the tensor can hold class labels: whole numbers, not bool."""
    return not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)


def count_labels(target: Tensor, ignored: int = IGNORED_LABEL) -> int | Tensor:
    """Labels that count: a number for a target on the CPU, a 0-dim tensor (no host sync) elsewhere or compiled."""
    counted = (target != ignored).sum()
    return int(counted) if target.device.type == "cpu" and not torch.compiler.is_compiling() else counted


def averages_elements(loss_fn: object) -> bool:
    """Whether the loss is one of PyTorch's that averages over every element, however many a sample has."""
    if isinstance(loss_fn, nn.Module):
        return type(loss_fn) in _OF_ELEMENTS and getattr(loss_fn, "reduction", None) == "mean"
    return any(loss_fn is function for function in _OF_ELEMENTS)


def class_weights(loss_fn: object) -> Tensor | None:
    """What the loss weighs classes by, if it is one of PyTorch's that averages over weights and not over labels."""
    if type(loss_fn) not in (nn.CrossEntropyLoss, nn.NLLLoss) or getattr(loss_fn, "reduction", None) != "mean":
        return None
    weight = getattr(loss_fn, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def weigh_labels(target: Tensor, weight: Tensor, ignored: int) -> int | Tensor:
    """The labels that count, each as many as its class weighs in parts of the mean weight; as `count_labels` gives it.

    So it is near a count, whatever unit the weights are in: FP16 gradients are scaled by it.
    """
    counted = target != ignored
    weight = weight.detach().float().to(target.device)
    found = torch.where(counted, weight[torch.where(counted, target, 0).long()], 0.0).sum() / weight.mean()
    on_host = target.device.type == "cpu" and not torch.compiler.is_compiling()
    return 0 if on_host and not found else found


def check_loss(loss: Any) -> Tensor:
    """The loss, if it is one that can be trained on; `BatchError` otherwise.

    That is a 0-dim floating tensor; while gradients are enabled it must also require grad.
    """
    if not isinstance(loss, Tensor):
        raise _bad_loss(f"a {type(loss).__name__}", "Return the tensor itself, before .item() or float()")
    if not loss.is_floating_point():
        raise _bad_loss(f"a tensor of {loss.dtype}", "Compute it from floating values")
    if loss.dim() != 0:
        raise _bad_loss(f"a tensor of shape {list(loss.shape)}", "Reduce it with .mean(), or .sum() and a count")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise _bad_loss(
            "a tensor without gradient history",
            "Compute it from the output without .detach(), .item() or torch.no_grad(), and leave some parameters "
            "with requires_grad=True",
        )
    return loss


def _cross_entropy_last(output: Tensor, target: Tensor) -> tuple[Tensor, int | Tensor]:
    return _cross_entropy(output.flatten(0, -2), target.flatten())


def _cross_entropy_second(output: Tensor, target: Tensor) -> tuple[Tensor, int | Tensor]:
    return _cross_entropy(output, target)


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, int | Tensor]:
    total = F.cross_entropy(_widened(logits), target.long(), reduction="sum", ignore_index=IGNORED_LABEL)
    count = count_labels(target)
    return mean_of(total, count), count


def _squared_error(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    output = _widened(output)
    return mean_of(F.mse_loss(output, target.to(output.dtype), reduction="sum"), output.numel()), output.numel()


def _binary_cross_entropy(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    output = _widened(output)
    total = F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="sum")
    return mean_of(total, output.numel()), output.numel()


def mean_of(total: Tensor, count: int | Tensor) -> Tensor:
    """A sum over so many items as their mean; 0 where there is none."""
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _widened(output: Tensor) -> Tensor:
    return output if output.dtype == torch.float64 else output.float()


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _no_loss(output: Any, target: Any) -> BatchError:
    passed = f"output {_describe(output)} with target {_describe(target)}, from which no loss can be inferred"
    return BatchError(
        explain(
            passed,
            f"an output with a .loss; or {_INFERRED}",
            "Pass loss_fn, (output, target) -> scalar, or let the model return its loss",
        )
    )


def _bad_loss(passed: str, change: str) -> BatchError:
    return BatchError(explain(f"the loss is {passed}", "a scalar (0-dim) floating tensor that requires grad", change))
