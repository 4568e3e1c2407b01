"""Where tensors are compressed on their way between device and host: on the host, or on a processor beside the GPU.

A `Placement` is that place. The one here is the host. Others, such as an NPU beside the GPU, are added by whoever has
one; those in our tests are simulated and say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.cast import cast
from deepseek_mp.precision import FORMATS

GROUP = 128
"""Values that share a scale."""
SMALLEST = 1 << 12
"""Tensors of fewer values are left as they are: their scales and calls would cost more than they save."""
_E4M3_MAX = FORMATS["fp8_e4m3"].max


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """A compressed tensor."""

    codes: Tensor
    """fp8_e4m3 [groups, GROUP], padded with zeros."""
    scales: Tensor
    """fp32 [groups, 1]: a value is its code times its scale."""
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    """Of the tensor, where it comes back to."""

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


class Placement(Protocol):
    """A place that compresses activations and gradients."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def simulated(self) -> bool:
        """Whether its times and its place are made up, its numbers being computed on the host."""

    def seconds(self, values: int) -> float:
        """Expected time to bring so many values there, compress them, and bring them to host memory."""

    def compress(self, tensor: Tensor) -> Packed:
        """The tensor in FP8, in groups with a scale each. Finite values stay finite; others become NaN."""

    def expand(self, packed: Packed) -> Tensor:
        """The tensor again, rounded, in its shape and dtype on its device."""


@dataclass(frozen=True, kw_only=True)
class HostPlacement:
    """The host: the tensor is copied as it is, and compressed by the processors.

    Args:
        link: bytes per second from the device to the host.
        memory: bytes per second that the processors compress.
    """

    link: float
    memory: float
    name: str = "host"
    simulated: bool = False

    def seconds(self, values: int) -> float:
        return values * 2 / self.link + values * 4 / self.memory  # sent as BF16, read as FP32

    def compress(self, tensor: Tensor) -> Packed:
        flat = tensor.detach().to("cpu", torch.float32).reshape(-1)
        groups = -(-flat.numel() // GROUP)
        padded = torch.zeros(groups * GROUP)
        padded[: flat.numel()] = flat
        rows = padded.view(groups, GROUP)
        largest = rows.abs().amax(dim=1, keepdim=True)
        # A scale below the normal numbers would be rounded itself, to zero in the end.
        scales = torch.where(largest > 0, (largest / _E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        codes = cast(rows / scales, "fp8_e4m3", saturate=False).tensor
        return Packed(codes=codes, scales=scales, shape=tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def expand(self, packed: Packed) -> Tensor:
        values = (packed.codes.float() * packed.scales).reshape(-1)[: packed.shape.numel()]
        return values.view(packed.shape).to(packed.device, packed.dtype)


def fastest(placements: Sequence[Placement], values: int) -> Placement:
    """The place that compresses so many values soonest; the first of equal ones."""
    if not placements:
        raise ConfigError(explain("no placements", "one or more", "Pass a HostPlacement"))
    return min(placements, key=lambda placement: placement.seconds(values))


def compressed_activations(placement: Placement, *, keep: Sequence[Tensor] = ()) -> AbstractContextManager[Any]:
    """A context for forward: what autograd saves for backward is held compressed.

    Args:
        placement: where it is compressed.
        keep: besides small and integer tensors, these are saved as they are: weights, which exist anyway.
    """
    kept = {tensor.untyped_storage().data_ptr() for tensor in keep}

    def pack(tensor: Tensor) -> Tensor | Packed:
        plain = not tensor.is_floating_point() or tensor.numel() < SMALLEST or tensor.dtype is torch.float64
        return tensor if plain or tensor.untyped_storage().data_ptr() in kept else placement.compress(tensor)

    def unpack(saved: Tensor | Packed) -> Tensor:
        return placement.expand(saved) if isinstance(saved, Packed) else saved

    return saved_tensors_hooks(pack, unpack)
