"""The cross entropy of a linear layer's output, in chunks of rows: the logits are never there as a whole.

The logits of a language model are its largest tensor: [P, V] for P tokens and V words, and the ordinary loss holds them
several times over, in the product's format, in FP32 as log-probabilities, and as gradients of both. Here a chunk of
rows is multiplied, turned into losses and at once into its part of the gradients, and forgotten.

**When the gradients are computed.** The head is the first layer of the backward, so that its gradients are needed when
all activations are still there, whenever they are computed: to wait for the backward saves no memory at the peak, and
costs a fourth product beside the three of a linear layer, since the logits have to be made again. So they are computed
in the forward, for an incoming gradient of one, and the backward multiplies them in place by the one that comes. What
is kept in between is of the sizes of hidden [P, K] and weight [V, K]. Three cases do wait and multiply again: reduction
'none', where each row has an incoming gradient of its own; FP16 products, which only the incoming gradient (the loss
scale) keeps within FP16's range; and a graph that is kept and gone through a second time.

**Numbers.** Products have the format of the autocast region, else that of the operands; what the ordinary loss rounds
is rounded here: the logits, and their gradients. Losses are FP32 (FP64 for FP64 operands), and the gradient of the
weight is added up over the chunks in FP32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from deepseek_mp.errors import ConfigError, ShapeError, explain
from deepseek_mp.nn.loss import IGNORED_LABEL, is_integer
from deepseek_mp.ops.cross_entropy import cross_entropy_rows

Reduction = Literal["mean", "sum", "none"]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden, weight and bias."""

REDUCTIONS = ("mean", "sum", "none")
CHUNK_BYTES = 64 << 20
"""What the logits of a chunk take in FP32 on a CPU, and on any device a part of the weight's gradient on its way to the
sum, which is there while all activations are.
"""
DEVICE_CHUNK_BYTES = 256 << 20
"""The same on other devices: a chunk reads and writes the whole gradient of the weight, so there are fewer."""
ROWS_MULTIPLE = 64
"""Chunks of that many rows or more have a multiple of it, which suits the tiles of a product."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORED_LABEL,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias).float(), target)`, without ever holding all logits.

    Equal to it up to the rounding of FP32 sums. Compiled code runs that very expression instead, which the compiler
    fuses in its own way.

    Args:
        hidden: [..., K] in fp32, bf16, fp16 or fp64.
        weight: [V, K].
        target: [...] of whole numbers, the classes 0 to V-1, or `ignore_index` for rows that do not count.
        bias: [V] or None.
        label_smoothing: from 0 to 1; the weight of the uniform distribution in the target.
        reduction: 'mean' over the rows that count (NaN where none does, as in PyTorch), 'sum', or 'none'.
        chunk: rows at a time; None: as many as have FP32 logits of `chunk_bytes`, 64 MiB on a CPU and 256 elsewhere.

    Returns:
        The loss in fp32 (fp64 for fp64 operands): 0-dim, or [...] with 'none'.

    Raises:
        ShapeError: sizes that do not fit each other.
        ConfigError: another argument that is not allowed; or, in a backward, a second derivative.
    """
    _check_shapes(hidden, weight, target, bias)
    dtype = _product_dtype(hidden, weight)
    _check_settings(label_smoothing, reduction, chunk)
    if torch.compiler.is_compiling():
        logits = F.linear(hidden, weight, bias).to(_sum_dtype(dtype)).reshape(-1, weight.shape[0])
        settings: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        loss = F.cross_entropy(logits, target.reshape(-1).long(), reduction=reduction, **settings)
        return loss.view(target.shape) if reduction == "none" else loss
    how = _How(
        dtype=dtype,
        ignored=ignore_index,
        smoothing=label_smoothing,
        reduction=reduction,
        rows=chunk or rows_of(weight.shape[0], chunk_bytes(hidden.device)),
        in_forward=torch.is_grad_enabled() and reduction != "none" and dtype != torch.float16,
    )
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).long()
    chunked: Tensor = _LinearCrossEntropy.apply(rows, weight, bias, labels, how)  # type: ignore[no-untyped-call]
    return chunked.view(target.shape) if reduction == "none" else chunked


def chunk_bytes(device: torch.device) -> int:
    """What the logits of a chunk take there, as FP32."""
    return CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES


def rows_of(classes: int, size: int) -> int:
    """Rows of a chunk for so many classes: their FP32 logits take that many bytes, or there is one row."""
    rows = max(1, size // (4 * classes))
    return rows - rows % ROWS_MULTIPLE if rows > ROWS_MULTIPLE else rows


@dataclass(frozen=True, kw_only=True)
class _How:
    """All but the tensors."""

    dtype: torch.dtype
    """Of the operands of the products, and of their results."""
    ignored: int
    smoothing: float
    reduction: Reduction
    rows: int
    in_forward: bool
    """Whether the forward computes the gradients that are needed."""


class _Operands:
    """Hidden [P, K], weight [V, K] and bias [V] as the products read them, and labels [P]."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: _How) -> None:
        self.x, self.how = x, how
        self.weight = weight.to(how.dtype)
        self.bias = None if bias is None else bias.to(how.dtype)
        self.counts = target != how.ignored
        """Whether a row does."""
        self.labels = target.masked_fill(~self.counts, 0)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.x.shape[0], self.how.rows):
            yield slice(start, start + self.how.rows)

    def losses(self, rows: slice, factors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of a chunk: the rows' losses [R] and, for each loss's own gradient [R], that of the logits [R, V]."""
        logits = F.linear(self.x[rows], self.weight, self.bias)
        smoothing = self.how.smoothing
        losses, gradient = cross_entropy_rows(logits, self.labels[rows], smoothing=smoothing, factors=factors)
        return losses.masked_fill_(~self.counts[rows], 0.0), gradient


class _Sums:
    """The gradients that are needed, filled chunk by chunk."""

    def __init__(self, operands: _Operands, needed: tuple[bool, bool, bool]) -> None:
        x, weight, sums = operands.x, operands.weight, _sum_dtype(operands.how.dtype)
        self._operands = operands
        self.hidden = torch.empty_like(x) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=sums) if needed[1] else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=sums) if needed[2] else None

    def add(self, gradient: Tensor, rows: slice) -> None:
        """What the gradient of a chunk's logits [R, V] adds."""
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            torch.mm(gradient, self._operands.weight, out=self.hidden[rows])
        if self.weight is not None:
            _add_product(self.weight, gradient.t(), self._operands.x[rows])

    def all(self) -> Gradients:
        return self.hidden, self.weight, self.bias


class _LinearCrossEntropy(Function):
    """(hidden [P, K], weight [V, K], bias [V] or None, labels [P], how) to the loss, 0-dim or [P]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: _How) -> Tensor:
        ctx.how, ctx.needed = how, ctx.needs_input_grad[:3]
        ctx.types = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        x = hidden.to(how.dtype)
        ctx.save_for_backward(x, weight, bias, target)
        with torch.autocast(x.device.type, enabled=False):
            operands = _Operands(x, weight, bias, target, how)
            sums = _Sums(operands, ctx.needed) if how.in_forward and any(ctx.needed) else None
            factors = None if sums is None else _factors(operands, None)
            losses = x.new_empty(x.shape[0], dtype=_sum_dtype(how.dtype))
            for rows in operands.chunks():
                losses[rows] = _chunk(operands, rows, sums, factors)
        ctx.gradients = None if sums is None else sums.all()
        if how.reduction == "none":
            return losses
        return losses.sum() / operands.counts.sum() if how.reduction == "mean" else losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, target = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # written below, and perhaps kept by who gets them
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if gradients is None:
                gradients = _computed(_Operands(x, weight, bias, target, ctx.how), grad, ctx.needed)
            else:
                for gradient in gradients:
                    if gradient is not None:
                        gradient *= grad
            found = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.types, strict=True)]
        if torch.is_grad_enabled():
            operands = (x, weight, bias)  # so that a derivative by one of them alone comes across the refusal too
            found = [None if g is None else _Once.apply(g.requires_grad_(), *operands) for g in found]  # type: ignore[no-untyped-call]
        return *found, None, None


class _Once(Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, *_operands: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, _grad: Tensor) -> Any:
        raise ConfigError(
            explain(
                "a second derivative of linear_cross_entropy",
                "first derivatives; it does not keep the logits that others are made of",
                "Use F.cross_entropy(F.linear(hidden, weight, bias), target), in a trainer with fused_loss=False",
            )
        )


def _computed(operands: _Operands, grad: Tensor, needed: tuple[bool, bool, bool]) -> Gradients:
    """The gradients for the incoming one, 0-dim or [P]; the logits are made again."""
    sums, factors = _Sums(operands, needed), _factors(operands, grad)
    for rows in operands.chunks():
        _chunk(operands, rows, sums, factors)
    return sums.all()


def _chunk(operands: _Operands, rows: slice, sums: _Sums | None, factors: Tensor | None) -> Tensor:
    """The losses [R] of a chunk, whose logits are gone when it returns; its gradients are added to the sums."""
    losses, gradient = operands.losses(rows, None if factors is None else factors[rows])
    if sums is not None and gradient is not None:
        sums.add(gradient, rows)
    return losses


def _factors(operands: _Operands, grad: Tensor | None) -> Tensor:
    """[P]: what the gradient of each row's loss is; none for rows that do not count. `grad` None stands for one."""
    counts, how = operands.counts, operands.how
    factors = counts.to(_sum_dtype(how.dtype))
    if how.reduction == "mean":
        factors /= counts.sum().clamp(min=1)
    return factors if grad is None else factors * grad


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, K], FP32, plus left [V, R] times right [R, K], part by part: where the product's own format is
    narrower, it takes memory of its own, in FP32 where the device can write that.

    `torch.addmm(total, ..., out_dtype=...)` would add at once, but PyTorch's `FlopCounterMode` (2.11) fails on it.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    wide = left.is_cuda and torch.version.cuda is not None
    size = max(1, CHUNK_BYTES // (4 * total.shape[1]))
    for sum_part, part in zip(total.split(size), left.split(size), strict=True):
        sum_part += torch.mm(part, right, out_dtype=torch.float32) if wide else part @ right


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What a linear layer would multiply in here."""
    kind = hidden.device.type
    wide = torch.float64 in (hidden.dtype, weight.dtype)  # autocast leaves it alone
    # PyTorch's compiler does not know the first question in all versions, and compiles for devices that have autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if available and torch.is_autocast_enabled(kind) and not wide:
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        passed = f"hidden of {hidden.dtype} and weight of {weight.dtype} outside of autocast"
        raise ConfigError(explain(passed, "one floating type for both", "Cast one of them, or use torch.autocast"))
    return hidden.dtype


def _check_shapes(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    fit = weight.dim() == 2 and hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[1]
    fit = fit and target.shape == hidden.shape[:-1] and (bias is None or bias.shape == weight.shape[:1])
    if not (fit and is_integer(target)):
        sizes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, target {target.dtype} {list(target.shape)}"
        passed = sizes if bias is None else f"{sizes}, bias {list(bias.shape)}"
        allowed = "hidden [..., K], weight [V, K], target [...] of whole numbers, bias [V] or None"
        raise ShapeError(explain(passed, allowed, "Pass tensors of these shapes"))


def _check_settings(smoothing: float, reduction: str, chunk: int | None) -> None:
    if not 0.0 <= smoothing <= 1.0:
        raise ConfigError(explain(f"label_smoothing={smoothing!r}", "a number from 0 to 1", "Change it"))
    if reduction not in REDUCTIONS:
        raise ConfigError(explain(f"reduction={reduction!r}", ", ".join(map(repr, REDUCTIONS)), "Use one of these"))
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ConfigError(explain(f"chunk={chunk!r}", "None or a whole number of rows from 1", "Change it"))
