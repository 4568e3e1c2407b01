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

Operands = tuple[Tensor, Tensor, Tensor | None]


class InputCast:
    """The cast of the last input, for the layers that read the same: query, key and value of an attention.

    A tensor is the same if it is the same object, with no change in place since, as far as PyTorch's version
    counters tell. The cast lives no longer than the tensor it was made of. Gradients of the layers are added in the
    type of the cast. Without gradients nothing is shared. Nor is checkpointing fooled: its recomputation finds the
    same values, and a cast saves nothing for the backward that would have to be counted.

    Layers that read one tensor on several streams of a device would have to wait for the first one's cast.
    """

    __slots__ = ("_dtype", "_last")

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def of(self, x: Tensor) -> Tensor:
        """The cast of x; x itself where autocast is to decide."""
        if type(x) is not Tensor or x.dtype != torch.float32 or not torch.is_grad_enabled() or x.is_inference():
            return x
        last = self._last
        if last is not None:
            source, version, cast = last
            if source() is x and version == x._version and cast.requires_grad == x.requires_grad:  # noqa: SLF001
                return cast
        cast = x.to(self._dtype)
        if not cast.is_inference():
            self._last = weakref.ref(x, self._gone), x._version, cast  # noqa: SLF001 - there is no public one
        return cast

    def forget(self) -> None:
        """Give the memory back."""
        self._last = None

    def _gone(self, _source: weakref.ref[Tensor]) -> None:
        """Called for the last tensor only: the reference to an earlier one went with its cast."""
        self._last = None


class Casts:
    """Tensors that were cast together, and their versions and where their values lay then."""

    __slots__ = ("addresses", "made", "outdated", "versions")

    def __init__(self) -> None:
        self.outdated = False
        """Whether a unit had other parameters than those that were cast for it."""
        self.made: Sequence[Tensor] = ()
        self.versions: Sequence[int] = ()
        self.addresses: Sequence[int] = ()


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

        That is when a parameter is another one or was written since, or an input of another type than the casts' meets
        no autocast to it.
        """
        casts, weight, bias = self._casts, self._weight, self._bias
        if parameters["weight"] is not weight or parameters["bias"] is not bias:
            casts.outdated = True
            return None
        place, place_of_bias = self._weight_place, self._bias_place
        versions, addresses = casts.versions, casts.addresses
        if weight._version != versions[place] or weight.data_ptr() != addresses[place]:  # noqa: SLF001
            return None
        if bias is not None and place_of_bias is not None:
            if bias._version != versions[place_of_bias] or bias.data_ptr() != addresses[place_of_bias]:  # noqa: SLF001
                return None
            bias = casts.made[place_of_bias]
        if x.dtype != self._dtype:
            kind = self._device
            if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != self._dtype:
                return None
            if self._inputs is not None:
                x = self._inputs.of(x)
        return x, casts.made[place], bias
