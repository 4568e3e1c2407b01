"""The kinds of linear layers that a served copy may have: what each keeps of a weight, and how it multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from deepseek_mp.ops import fp8_linear as fp8
from deepseek_mp.ops import int4_linear as int4
from deepseek_mp.ops import weight_only
from deepseek_mp.ops.reference.int4_linear import widened

Kept = dict[str, Tensor]
"""By name, what a layer keeps of its weight: its buffers, and beside the bias its state."""


class LinearKind(Protocol):
    """One kind. `Kept` is of one form everywhere; an implementation may read it in an order of its own."""

    @property
    def needs(self) -> str | None:
        """The format that a device has to multiply for it, of `Capabilities.matmul_formats`; None: no other one."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded too, in each call."""

    def why_not(self, channels: int, width: int) -> str:
        """Why there is no such layer of these sizes; empty if there is."""

    def fastest(self, device: torch.device, dtype: torch.dtype, channels: int, width: int) -> str | None:
        """The implementation there beside activations of a dtype; None: only the slow reference."""

    def sizes(self, kept: Mapping[str, Tensor]) -> tuple[int, int]:
        """Channels and width of a layer that keeps this."""

    def keep(self, weight: Tensor, name: str) -> Kept:
        """A weight [N, K], rounded; `ConfigError`, with its name, for values that are not finite."""

    def prepared(self, kept: Mapping[str, Tensor], implementation: str) -> Kept:
        """It as the implementation reads it."""

    def unprepared(self, prepared: Kept, implementation: str) -> Kept:
        """What `prepared` was given."""

    def channel_dims(self, implementation: str) -> Mapping[str, int]:
        """Along which dimension the channels are in what it reads; empty if layers cannot be laid beside each other."""

    def linear(self, x: Tensor, prepared: Kept, bias: Tensor | None, implementation: str) -> Tensor:
        """[M, K] to [M, N]."""

    def widened(self, kept: Kept) -> Tensor:
        """The weight [N, K] that it stands for, in fp32."""


class _ByChannel:
    """What is kept in 8 bits with a scale for each output channel: q [N, K] and scale [N]."""

    format: str
    needs: str | None = None
    rounds_inputs = False

    def keep(self, weight: Tensor, name: str) -> Kept:
        q, scale = weight_only.quantised_weight(weight, self.format, name)
        return {"q": q, "scale": scale}

    def sizes(self, kept: Mapping[str, Tensor]) -> tuple[int, int]:
        channels, width = kept["q"].shape
        return channels, width

    def prepared(self, kept: Mapping[str, Tensor], _implementation: str) -> Kept:
        return dict(kept)

    def unprepared(self, prepared: Kept, _implementation: str) -> Kept:
        return prepared

    def channel_dims(self, _implementation: str) -> Mapping[str, int]:
        return {"q": 0, "scale": 0}

    def widened(self, kept: Kept) -> Tensor:
        return kept["q"].float() * kept["scale"][:, None]


class Weights8(_ByChannel):
    """Weights in int8 or FP8, products in 16 bits."""

    def __init__(self, format: str, needs: str | None) -> None:
        self.format, self.needs = format, needs

    def why_not(self, _channels: int, _width: int) -> str:
        return ""

    def fastest(self, device: torch.device, dtype: torch.dtype, _channels: int, width: int) -> str | None:
        return weight_only.fastest(device, dtype, self.format, width)

    def linear(self, x: Tensor, prepared: Kept, bias: Tensor | None, implementation: str) -> Tensor:
        q, scale = prepared["q"], prepared["scale"]
        return weight_only.weight_only_linear(x, q, scale, bias, implementation=implementation)


class Fp8(_ByChannel):
    """Weights and activations in FP8, multiplied as such."""

    format, needs, rounds_inputs = "fp8", fp8.FORMAT, True

    def why_not(self, channels: int, width: int) -> str:
        fits = channels % fp8.WIDTH == 0 and width % fp8.WIDTH == 0
        return "" if fits else f"{channels} channels of {width} weights are not in whole {fp8.WIDTH}s"

    def fastest(self, device: torch.device, dtype: torch.dtype, channels: int, width: int) -> str | None:
        return fp8.fastest(device, dtype, channels, width)

    def linear(self, x: Tensor, prepared: Kept, bias: Tensor | None, implementation: str) -> Tensor:
        return fp8.fp8_linear(x, prepared["q"], prepared["scale"], bias, implementation=implementation)


class Weights4:
    """Weights in 4 bits with a scale and a zero for each group, products in 16 bits."""

    needs: str | None = None
    rounds_inputs = False

    def why_not(self, _channels: int, width: int) -> str:
        return "" if int4.group_of(width) else f"its rows of {width} weights are not in whole {int4.GROUPS[-1]}s"

    def fastest(self, device: torch.device, dtype: torch.dtype, channels: int, width: int) -> str | None:
        return int4.fastest(device, dtype, channels, width)

    def sizes(self, kept: Mapping[str, Tensor]) -> tuple[int, int]:
        channels, half = kept["q"].shape
        return channels, 2 * half

    def keep(self, weight: Tensor, name: str) -> Kept:
        q, scale, zero = int4.int4_weight(weight, name)
        return {"q": q, "scale": scale, "zero": zero}

    def prepared(self, kept: Mapping[str, Tensor], implementation: str) -> Kept:
        made = int4.prepared(kept["q"], kept["scale"], kept["zero"], implementation=implementation)
        return {name: part for name, part in zip(kept, made, strict=True) if part is not None}

    def unprepared(self, prepared: Kept, _implementation: str) -> Kept:
        made = int4.unprepared(prepared["q"], prepared["scale"], prepared.get("zero"))
        return dict(zip(("q", "scale", "zero"), made, strict=True))

    def channel_dims(self, implementation: str) -> Mapping[str, int]:
        return {} if implementation == "native" else {"q": 0, "scale": 1, "zero": 1}

    def linear(self, x: Tensor, prepared: Kept, bias: Tensor | None, implementation: str) -> Tensor:
        q, scale, zero = prepared["q"], prepared["scale"], prepared.get("zero")
        return int4.int4_linear(x, q, scale, zero, bias, implementation=implementation)

    def widened(self, kept: Kept) -> Tensor:
        return widened(kept["q"], kept["scale"], kept["zero"])


KINDS: Mapping[str, LinearKind] = MappingProxyType(
    {
        "int8_weights": Weights8("int8", None),
        "fp8_weights": Weights8("fp8", fp8.FORMAT),
        "fp8": Fp8(),
        "int4_weights": Weights4(),
    }
)
"""By name; the names are those of `form.LINEAR_KINDS`."""
