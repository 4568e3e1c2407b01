"""The casts that compute their tensor themselves, in plain PyTorch: computed, then cast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_mp.ops.operands import Cast, Operands, cast_of_value
from deepseek_mp.ops.reference.quantise import quantise, quantise_delayed
from deepseek_mp.ops.sources import compute


@torch.no_grad()
def quantise_made(inputs: Sequence[Tensor], source: str, cast: Cast) -> Operands:
    """See `ops.schema_made.quantise_made`."""
    return quantise(compute(source, inputs), cast)


@torch.no_grad()
def quantise_made_delayed(inputs: Sequence[Tensor], source: str, top: Tensor, amax: Tensor, cast: Cast) -> Operands:
    """See `ops.schema_made.quantise_made_delayed`."""
    return quantise_delayed(compute(source, inputs), top, amax, cast)


def quantise_gate_grads(
    inputs: tuple[Tensor, Tensor, Tensor], activation: str, cast: Cast, value_format: str | None
) -> tuple[Tensor, ...]:
    """See `ops.schema_made.quantise_gate_grads`."""
    x, up, g = inputs
    of_x = quantise_made((x, up, g), f"{activation}_gate_grad", cast)
    value = quantise_made((x, up), f"{activation}_gate", cast_of_value(cast, value_format))
    return *of_x, *quantise_made((x, g), f"{activation}_gate", cast), *value[2:]


def quantise_gate_grads_delayed(
    inputs: tuple[Tensor, Tensor, Tensor],
    activation: str,
    tops: tuple[Tensor, Tensor, Tensor | None],
    maxima: tuple[Tensor, Tensor],
    cast: Cast,
    value_format: str | None,
) -> tuple[Tensor, ...]:
    """See `ops.schema_made.quantise_gate_grads_delayed`."""
    x, up, g = inputs
    value_top, noted = x.new_zeros(2, dtype=torch.float32)
    if tops[2] is not None:
        value_top = tops[2]
    of_x = quantise_made_delayed((x, up, g), f"{activation}_gate_grad", tops[0], maxima[0], cast)
    of_up = quantise_made_delayed((x, g), f"{activation}_gate", tops[1], maxima[1], cast)
    value_cast = cast_of_value(cast, value_format)
    return *of_x, *of_up, *quantise_made_delayed((x, up), f"{activation}_gate", value_top, noted, value_cast)[2:]
