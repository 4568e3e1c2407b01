"""What a unit is lent in place of the casts that autocast would make in its forward: cast weights, and one cast input.

Autocast casts what a layer reads by a kernel for each tensor, and gradients back by one for each. A unit of the
base format that finds a `LentCast` computes its original forward with a weight and a bias that were cast before
(`nn.weight_casts`), and a linear one takes the cast of its input from the layer before it, if that read the same
tensor. Whatever is not as it was when the casts were made sends the unit back to its original forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

Operands = tuple[Tensor, Tensor, Tensor | None]
READERS = 4
"""Layers that share one cast of their input: query, key, value and a gate."""


class InputCast:
    """The cast of the last input, for the layers that read the same: query, key and value of an attention.

    A tensor is the same if it is the same object with the same history and memory, and no change in place since, as
    far as PyTorch's version counters tell. The cast lives no longer than the tensor it was made of. Gradients of the
    layers are added in the type of the cast, so at most `READERS` share one: a long sum in BF16 stalls, and in FP16,
    where it could overflow though no part of it does, nothing is shared. Neither is anything without gradients, nor
    over the border of a dispatch mode: selective checkpointing wants the same operations in its recomputation. Plain
    checkpointing finds the same values, and a cast saves nothing for the backward that would have to be counted.

    Layers that read one tensor on several streams of a device would have to wait for the first one's cast.
    """

    __slots__ = ("_dtype", "_last")

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._last: _LastCast | None = None

    def of(self, x: Tensor) -> Tensor:
        """The cast of x; x itself where autocast is to decide."""
        plain = type(x) is Tensor and x.dtype == torch.float32 and self._dtype == torch.bfloat16
        if not plain or not torch.is_grad_enabled() or x.is_inference() or is_functorch_wrapped_tensor(x):
            return x
        last = self._last
        if last is not None and last.left and last.source() is x and last.state == _state(x):
            last.left -= 1
            return last.cast
        cast = x.to(self._dtype)
        if not cast.is_inference():
            self._last = _LastCast(weakref.ref(x, self._gone), _state(x), cast)
        return cast

    def forget(self) -> None:
        """Give the memory back."""
        self._last = None

    def _gone(self, _source: weakref.ref[Tensor]) -> None:
        """Called for the last tensor only: the reference to an earlier one went with its cast."""
        self._last = None


class _LastCast:
    """A cast, what it was made of, and how many layers may still take it."""

    __slots__ = ("cast", "left", "source", "state")

    def __init__(self, source: weakref.ref[Tensor], state: tuple[object, ...], cast: Tensor) -> None:
        self.source, self.state, self.cast = source, state, cast
        self.left = READERS - 1


def _state(x: Tensor) -> tuple[object, ...]:
    """What is equal as long as a cast of x is one of x as it is, and as every mode that watches would see it made."""
    depth = torch._C._len_torch_dispatch_stack()  # noqa: SLF001 - there is no public one
    mode = torch._C._get_dispatch_stack_at(depth - 1) if depth else None  # noqa: SLF001
    return x._version, x.data_ptr(), x.requires_grad, x.grad_fn, mode  # noqa: SLF001


class Casts:
    """Tensors that were cast together, with their versions and values: kept, so that no others come to lie there."""

    __slots__ = ("made", "outdated", "values", "versions")

    def __init__(self) -> None:
        self.outdated = False
        """Whether a unit had other parameters than those that were cast for it."""
        self.made: Sequence[Tensor] = ()
        self.versions: Sequence[int] = ()
        self.values: Sequence[Tensor] = ()

    def are_of(self, tensor: Tensor, place: int) -> bool:
        """Whether the tensor of this place still is what was cast, and is to get a gradient: parts may be frozen for
        a while within a forward.
        """
        return (
            tensor._version == self.versions[place]  # noqa: SLF001 - there is no public one
            and tensor.data_ptr() == self.values[place].data_ptr()
            and tensor.requires_grad
        )


class LentCast:
    """Where a unit finds the casts of its weight and bias, and what they were made of.

    `places` are those of weight and bias among the casts; a bias that has none is left to autocast. `inputs` is
    None for a unit that takes its input as it is.
    """

    __slots__ = ("_bias", "_bias_place", "_casts", "_device", "_dtype", "_inputs", "_weight", "_weight_place")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        casts: Casts,
        places: tuple[int, int | None],
        inputs: InputCast | None,
    ) -> None:
        self._weight, self._bias = weight, bias
        self._dtype, self._device = dtype, weight.device.type
        self._casts, self._inputs = casts, inputs
        self._weight_place, self._bias_place = places

    def operands(self, parameters: Mapping[str, Tensor | None], x: Tensor) -> Operands | None:
        """Input, weight and bias for a unit with these parameters; None where the original forward is to run.

        That is when a parameter is another one (or none: pruned, or computed by a parametrisation), was written since
        or gets no gradient for now, or when no autocast to the casts' type is in force.
        """
        kind = self._device
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != self._dtype:
            return None
        casts, weight, bias = self._casts, self._weight, self._bias
        if parameters.get("weight") is not weight or "bias" not in parameters or parameters["bias"] is not bias:
            casts.outdated = True
            return None
        place, place_of_bias = self._weight_place, self._bias_place
        if not casts.are_of(weight, place):
            return None
        if bias is not None and place_of_bias is not None:
            if not casts.are_of(bias, place_of_bias):
                return None
            bias = casts.made[place_of_bias]
        if self._inputs is not None and x.dtype != self._dtype:
            x = self._inputs.of(x)
        return x, casts.made[place], bias
