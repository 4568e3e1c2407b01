"""The casts that compute their tensor themselves, as Triton kernels: for scales that one pass over it can make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_mp.ops.operands import Cast, Operands, cast_of_value, empty_operands
from deepseek_mp.ops.sources import SOURCES
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.made_kernel import (
    cast_gate_grads_kernel,
    cast_made_kernel,
    unknown_gate_amax_kernel,
    unknown_made_amax_kernel,
)
from deepseek_mp.ops.triton.quantise import AMAX_BLOCK, WARPS, bytes_and_words, cast_constants, tiles_of

_Three = tuple[Tensor, Tensor, Tensor]


def quantise_made(inputs: Sequence[Tensor], source: str, cast: Cast) -> Operands:
    """See `ops.schema_made.quantise_made`."""
    x = inputs[0]
    return _cast_made(inputs, source, (x, x, x), cast, cast.granularity)  # one pass needs no maxima


def quantise_made_delayed(inputs: Sequence[Tensor], source: str, top: Tensor, amax: Tensor, cast: Cast) -> Operands:
    """See `ops.schema_made.quantise_made_delayed`."""
    x = inputs[0]
    own = x.new_zeros((), dtype=torch.float32)
    if x.numel():
        with on_device(x.device):
            unknown_made_amax_kernel[_amax_grid(x)](
                *_arguments(inputs, source), own, top, x.numel(), **_source_constants(source), PTX=_ptx(),
                BLOCK=AMAX_BLOCK, num_warps=8,
            )  # fmt: skip
    return _cast_made(inputs, source, (own, top, amax), cast, "delayed")


def quantise_gate_grads(inputs: _Three, activation: str, cast: Cast, value_format: str | None) -> tuple[Tensor, ...]:
    """See `ops.schema_made.quantise_gate_grads`."""
    x = inputs[0]
    return _cast_gate_grads(
        inputs, activation, x, (x, x, x), (x, x), cast, kind=cast.granularity, value_format=value_format
    )


def quantise_gate_grads_delayed(
    inputs: _Three,
    activation: str,
    tops: tuple[Tensor, Tensor, Tensor | None],
    maxima: tuple[Tensor, Tensor],
    cast: Cast,
    value_format: str | None,
) -> tuple[Tensor, ...]:
    """See `ops.schema_made.quantise_gate_grads_delayed`."""
    x = inputs[0]
    own = x.new_zeros(3, dtype=torch.float32)
    x_top, up_top, value_top = tops
    known = x_top, up_top, own if value_top is None else value_top
    if x.numel():
        with on_device(x.device):
            unknown_gate_amax_kernel[_amax_grid(x)](
                *inputs, own, *known, x.numel(), ACTIVATION=activation, VALUE=value_format is not None, PTX=_ptx(),
                BLOCK=AMAX_BLOCK, num_warps=8,
            )  # fmt: skip
    return _cast_gate_grads(inputs, activation, own, known, maxima, cast, kind="delayed", value_format=value_format)


def _cast_made(inputs: Sequence[Tensor], source: str, maxima: _Three, cast: Cast, kind: str) -> Operands:
    """The cast with maxima that are there: of the whole, the one to hold, the one to raise."""
    x = inputs[0]
    made = empty_operands(x, cast)
    across, down, padded = tiles_of(x, cast)
    if across * down:
        with on_device(x.device):
            cast_made_kernel[(across, down)](
                *_arguments(inputs, source), *maxima, *bytes_and_words(made), *x.shape, padded,
                **_source_constants(source), **cast_constants(cast, kind), **_registers(kind),
            )  # fmt: skip
    return made


def _cast_gate_grads(
    inputs: _Three,
    activation: str,
    own: Tensor,
    tops: _Three,
    maxima: tuple[Tensor, Tensor],
    cast: Cast,
    *,
    kind: str,
    value_format: str | None,
) -> tuple[Tensor, ...]:
    """All casts, with the maxima [3] of gradients and value, those to hold, and those of the gradients to raise."""
    x = inputs[0]
    value_cast = cast_of_value(cast, value_format)
    of_x, of_up, value = empty_operands(x, cast), empty_operands(x, cast), empty_operands(x, value_cast)
    across, down, padded = tiles_of(x, cast)
    if across * down:
        of_value = cast_constants(value_cast, kind)
        with on_device(x.device):
            cast_gate_grads_kernel[((2 + value_cast.columns) * across, down)](
                *inputs, own, tops[0], maxima[0], *bytes_and_words(of_x), tops[1], maxima[1], *bytes_and_words(of_up),
                tops[2], *bytes_and_words(value)[2:], *x.shape, padded,
                ACTIVATION=activation, VALUE_FORMAT=of_value["FORMAT"] if value_cast.columns else None,
                VALUE_LARGEST=of_value["LARGEST"], **cast_constants(cast, kind), **_registers(kind),
            )  # fmt: skip
    return *of_x, *of_up, *value[2:]


def _arguments(inputs: Sequence[Tensor], source: str) -> _Three:
    """x, up and g as the kernels take them: in the place of what the source does not read, something."""
    found, x = SOURCES[source], inputs[0]
    return x, inputs[1] if found.gate else x, inputs[-1]


def _source_constants(source: str) -> dict[str, str | bool]:
    found = SOURCES[source]
    return {"ACTIVATION": found.activation, "GATE": found.gate, "GRAD": found.grad}


def _registers(kind: str) -> dict[str, int]:
    """Two programs of eight warps fit an NVIDIA multiprocessor at 128 registers a thread; some would take more."""
    return {"maxnreg": 128} if _ptx() and WARPS[kind] == 8 else {}


def _amax_grid(x: Tensor) -> tuple[int]:
    return (-(-x.numel() // AMAX_BLOCK),)


def _ptx() -> bool:
    return torch.version.hip is None
