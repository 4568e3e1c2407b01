"""BatchNorm and ReLU in a row: their output computed again from the BatchNorm's input, bit for bit.

A ReLU's output is stored twice over: its own backward needs a bit of each value, and the layer that reads it needs all
of them. The BatchNorm's input is saved too, and the output follows from it by the same two operations. They give the
same bits again where every value is computed in an order that nothing changes. For a BatchNorm in training that holds
on a CPU for contiguous input: the sums of a channel are made by one thread, from the first value to the last. With
`channels_last` input the sums depend on the number of threads, and on other devices on kernels that are not ours; those
pairs are left alone. The first output of each shape and dtype is compared with what is computed again, whatever was
argued here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.activations.origin import is_plain
from deepseek_mp.activations.stored import Stored, check_version, version_of
from deepseek_mp.ops.own_work import own_work

_ARGUMENTS = "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
"""Of `torch.nn.functional.batch_norm`, in order."""
_proven: set[tuple[object, ...]] = set()
"""Shapes and dtypes whose outputs have been computed again and compared."""


class NormCall(NamedTuple):
    """A call of `batch_norm`: what its output follows from, or why it is not computed again."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    obstacle: str
    """Empty if there is none."""


def norm_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormCall:
    """What matters of a call of `torch.nn.functional.batch_norm` with these arguments.

    Running statistics and their momentum do not enter the output of a training step.
    """
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    obstacle = _obstacle(x, weight, bias, training=given.get("training", False))
    return NormCall(x, weight, bias, given.get("eps", 1e-5), obstacle)


def _obstacle(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, training: bool) -> str:
    if not all(is_plain(tensor) for tensor in (x, weight, bias) if tensor is not None):
        return "a tensor is of a class of its own"
    if not training:
        return "the BatchNorm is not in training mode"
    if x.device.type != "cpu":
        return f"equal sums are not proven on {x.device.type}"
    if not x.is_contiguous():
        return "the sums of an input that is not contiguous depend on the number of threads"
    return ""


class Recomputed:
    """The output of a BatchNorm and ReLU, as a way to compute it."""

    nbytes = 0

    def __init__(self, x: Stored, call: NormCall) -> None:
        """`x` is the input as it is held for the BatchNorm's own backward."""
        self._x, self._eps = x, call.eps
        self._affine = [None if t is None else (t.detach(), version_of(t)) for t in (call.weight, call.bias)]

    @torch.no_grad()
    def restore(self) -> Tensor:
        """The output.

        Raises:
            RuntimeError: the input, the weight or the bias was modified in place since.
        """
        x = self._x.restore()
        for held in self._affine:
            if held is not None:
                check_version(*held)
        weight, bias = (None if held is None else held[0] for held in self._affine)
        with torch.autocast(x.device.type, enabled=False):
            return F.relu(F.batch_norm(x, None, None, weight, bias, training=True, momentum=0.0, eps=self._eps))


def is_exact(recomputed: Recomputed, output: Tensor) -> bool:
    """Whether the same bits come out; asked of one output of each shape and dtype."""
    known = output.dtype, tuple(output.shape), output.stride()
    if known not in _proven:
        with own_work():
            again = recomputed.restore()
            if again.dtype is not output.dtype or not same_bits(again, output):
                return False
        _proven.add(known)
    return True


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with NaN in the same places."""
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call."""
    return args[0] if args else kwargs.get("input")
