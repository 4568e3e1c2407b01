"""Which losses are the cross entropy of the model's output with the target, and nothing else.

Such a loss can be computed from the input of the model's last layer (`nn.chunked_loss`). A function cannot be looked
into: one of your own says so by `computes_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.chunked_loss import linear_cross_entropy
from deepseek_mp.nn.loss import IGNORED_LABEL, LossFn, classes_last, count_labels, is_integer, mean_of

Loss = TypeVar("Loss", bound=Callable[..., object])
_MARK = "_computes_cross_entropy"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross entropy of logits [..., C] with labels [...] that are not `ignore_index`."""

    ignore_index: int = IGNORED_LABEL
    label_smoothing: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    flat: bool = False
    """Whether only logits [N, C] are meant, since classes come second in others."""
    counts: bool = False
    """Whether the loss comes with its number of labels, and is 0 where there is none."""

    def fits(self, output: Tensor, target: object) -> bool:
        """Whether the loss of these has the classes of the output last; the output's shape is all that is asked."""
        if not (isinstance(target, Tensor) and is_integer(target) and target.device == output.device):
            return False
        if self.flat:
            return output.dim() == 2 and target.shape == output.shape[:1]
        return output.dim() >= 2 and (
            classes_last(output, target) if self.counts else target.shape == output.shape[:-1]
        )

    def of(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor | tuple[Tensor, int | Tensor]:
        """The loss, for the operands of the layer that gives the logits; with its number of labels if it `counts`."""
        loss = linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum" if self.counts else self.reduction,
        )
        if not self.counts:
            return loss
        count = count_labels(target, self.ignore_index)
        return mean_of(loss, count), count


def computes_cross_entropy(
    *, ignore_index: int = IGNORED_LABEL, label_smoothing: float = 0.0, reduction: Literal["mean", "sum"] = "mean"
) -> Callable[[Loss], Loss]:
    """Say of a loss function that it is `F.cross_entropy` of all rows of the output [..., C] with the target [...].

    A trainer with `fused_loss` then computes it without holding the logits, once it has compared the two on a part of
    the first batch.

    Example:
        @computes_cross_entropy()
        def loss(scores, target):
            return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten())

    Args:
        ignore_index: the label of rows that do not count.
        label_smoothing: from 0 to 1.
        reduction: 'mean' over the rows that count, or 'sum'.

    Raises:
        ConfigError: another reduction or smoothing.
    """
    if reduction not in ("mean", "sum") or not 0.0 <= label_smoothing <= 1.0:
        passed = f"reduction={reduction!r}, label_smoothing={label_smoothing!r}"
        raise ConfigError(explain(passed, "'mean' or 'sum', and a number from 0 to 1", "Say what the function does"))
    mark = CrossEntropy(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)

    def marked(loss: Loss) -> Loss:
        setattr(loss, _MARK, mark)
        return loss

    return marked


def known_cross_entropy(loss_fn: LossFn | None) -> CrossEntropy | str:
    """What a trainer's `loss_fn` computes, or why that is not known. None is the loss that is inferred."""
    if loss_fn is None:
        return CrossEntropy(counts=True)
    if loss_fn is F.cross_entropy:
        return CrossEntropy(flat=True)
    if type(loss_fn) is nn.CrossEntropyLoss:
        return _of_module(loss_fn)
    mark = getattr(loss_fn, _MARK, None)
    if isinstance(mark, CrossEntropy):
        return mark
    return "loss_fn is not known to be the cross entropy of the output (mark it with computes_cross_entropy)"


def _of_module(loss: nn.CrossEntropyLoss) -> CrossEntropy | str:
    if loss.weight is not None:
        return "the loss weighs its classes"
    if any(getattr(loss, hooks) for hooks in _HOOKS):
        return "the loss has hooks"
    if loss.reduction not in ("mean", "sum"):
        return f"the loss has reduction={loss.reduction!r}"
    reduction: Literal["mean", "sum"] = "sum" if loss.reduction == "sum" else "mean"
    return CrossEntropy(
        ignore_index=loss.ignore_index, label_smoothing=loss.label_smoothing, reduction=reduction, flat=True
    )
