"""The casts that compute their tensor themselves, as Triton kernels: for scales that one pass over it can make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_mp.ops.operands import Cast, Operands, empty_operands
from deepseek_mp.ops.sources import SOURCES
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
        unknown_made_amax_kernel[_amax_grid(x)](
            *_arguments(inputs, source), own, top, x.numel(), **_source_constants(source), PTX=_ptx(),
            BLOCK=AMAX_BLOCK, num_warps=8,
        )  # fmt: skip
    return _cast_made(inputs, source, (own, top, amax), cast, "delayed")


def quantise_gate_grads(inputs: _Three, activation: str, cast: Cast) -> tuple[Tensor, ...]:
    """See `ops.schema_made.quantise_gate_grads`."""
    x = inputs[0]
    return _cast_gate_grads(inputs, activation, x, ((x, x), (x, x)), cast, cast.granularity)


def quantise_gate_grads_delayed(
    inputs: _Three, activation: str, tops: tuple[Tensor, Tensor], maxima: tuple[Tensor, Tensor], cast: Cast
) -> tuple[Tensor, ...]:
    """See `ops.schema_made.quantise_gate_grads_delayed`."""
    x = inputs[0]
    own = x.new_zeros(2, dtype=torch.float32)
    if x.numel():
        unknown_gate_amax_kernel[_amax_grid(x)](
            *inputs, own, *tops, x.numel(), ACTIVATION=activation, PTX=_ptx(), BLOCK=AMAX_BLOCK, num_warps=8
        )
    return _cast_gate_grads(inputs, activation, own, ((tops[0], maxima[0]), (tops[1], maxima[1])), cast, "delayed")


def _cast_made(inputs: Sequence[Tensor], source: str, maxima: _Three, cast: Cast, kind: str) -> Operands:
    """The cast with maxima that are there: of the whole, the one to hold, the one to raise."""
    x = inputs[0]
    made = empty_operands(x, cast)
    across, down, padded = tiles_of(x, cast)
    if across * down:
        cast_made_kernel[(across, down)](
            *_arguments(inputs, source), *maxima, *bytes_and_words(made), *x.shape, padded,
            **_source_constants(source), **cast_constants(cast, kind), **_registers(kind),
        )  # fmt: skip
    return made


def _cast_gate_grads(
    inputs: _Three,
    activation: str,
    own: Tensor,
    scaling: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    cast: Cast,
    kind: str,
) -> tuple[Tensor, ...]:
    """Both casts, with the maxima [2] of both gradients and for each the one to hold and the one to raise."""
    x = inputs[0]
    of_x, of_up = empty_operands(x, cast), empty_operands(x, cast)
    across, down, padded = tiles_of(x, cast)
    if across * down:
        cast_gate_grads_kernel[(2 * across, down)](
            *inputs, own, *scaling[0], *bytes_and_words(of_x), *scaling[1], *bytes_and_words(of_up), *x.shape, padded,
            ACTIVATION=activation, **cast_constants(cast, kind), **_registers(kind),
        )  # fmt: skip
    return *of_x, *of_up


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
