"""How an optimizer keeps its moments: in FP32, or in 8-bit blocks that are opened a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepseek_mp.errors import ShapeError, explain
from deepseek_mp.ops.block_states import BLOCK, Blocks, decode, dither, empty_blocks, encode, part

SMALLEST = 4096
"""Values from which on a parameter's moments go into blocks: smaller ones are nothing beside the rest of a model."""
PIECE = {"cpu": 1 << 17}
"""Values that are opened at once, by device: those of a CPU stay in its cache."""
_PIECE_ELSEWHERE = 1 << 22
CODES, SCALES = "_codes", "_scales"
"""What is added to a moment's key for its blocks."""

Moments = Mapping[str, torch.dtype]
"""The moments of a rule by key, with the type of their codes: `SIGNED` or `UNSIGNED`."""


class StateFormat(StrEnum):
    """How a parameter's moments are kept between steps."""

    FP32 = "fp32"
    """4 bytes for each value."""
    EIGHT_BIT = "8bit"
    """1 byte, and an FP32 scale for every 256."""


def goes_in_blocks(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the moments of a parameter of this group are kept in blocks: of matrices that are not small."""
    return (
        group["states"] == StateFormat.EIGHT_BIT
        and parameter.dim() > 1
        and parameter.numel() >= SMALLEST
        and parameter.dtype is not torch.float64
    )


def new_moments(parameter: Tensor, moments: Moments, *, in_blocks: bool) -> dict[str, Tensor]:
    """Zeros in the form they are kept in."""
    if not in_blocks:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return {name: torch.zeros_like(parameter, dtype=dtype) for name in moments}
    made: dict[str, Tensor] = {}
    for name, kind in moments.items():
        _keep(made, name, empty_blocks(parameter.numel(), kind, parameter.device))
    return made


def blocks_of(state: Mapping[str, Any], name: str) -> Blocks | None:
    """A moment's blocks; None if it is not kept in such."""
    return Blocks(state[name + CODES], state[name + SCALES]) if name + CODES in state else None


def moment_rows(
    state: Mapping[str, Any], name: str, parameter: Tensor, start: int = 0, stop: int | None = None
) -> Tensor | None:
    """Neighbouring rows of a moment, in FP32 if it is in blocks; None if the optimizer, any one, keeps no such moment.

    Args:
        state: of the parameter.
        name: key of the moment in FP32.
        parameter: whose moment it is, of at least one dimension.
        start, stop: of the rows, along the first dimension.
    """
    blocks = blocks_of(state, name)
    if blocks is None:
        kept = state.get(name)
        return kept[start:stop] if isinstance(kept, Tensor) and kept.shape == parameter.shape and kept.dim() else None
    width = parameter.numel() // parameter.shape[0]
    first, last = start * width, min(stop or parameter.shape[0], parameter.shape[0]) * width
    aligned = first // BLOCK * BLOCK
    return decode(part(blocks, aligned, last))[first - aligned :].view(-1, *parameter.shape[1:])


def convert(state: dict[str, Any], parameter: Tensor, moments: Moments, *, in_blocks: bool) -> None:
    """Bring moments into the form they are to be kept in, in place; nothing if they are. Blocks round to nearest.

    What the rule has kept no moment of yet gets zeros.

    Raises:
        ShapeError: moments of another number of values than the parameter has, or on another device.
    """
    count, device = parameter.numel(), parameter.device
    for name, kind in moments.items():
        codes, whole = state.get(name + CODES), state.get(name)
        kept = whole if codes is None else codes
        if kept is None:
            state |= new_moments(parameter, {name: kind}, in_blocks=in_blocks)
            continue
        if kept.numel() != count or kept.device != device:  # kernels are given addresses, and would go beyond
            _refuse(kept, parameter)
        if whole is None:
            if not in_blocks:
                found = decode(Blocks(state.pop(name + CODES), state.pop(name + SCALES))).view(parameter.shape)
                state[name] = torch.empty_like(parameter, dtype=torch.float32).copy_(found)
        elif in_blocks:
            _keep(state, name, encode(state.pop(name).float().reshape(-1), kind))
        elif whole.dtype is not torch.float32:
            state[name] = whole.to(torch.promote_types(parameter.dtype, torch.float32))


def _refuse(moment: Tensor, parameter: Tensor) -> NoReturn:
    passed = f"moments of {moment.numel()} values on {moment.device} for a parameter"
    change = "Make the optimizer after the model is moved or changed, or load its state again"
    passed = f"{passed} {list(parameter.shape)} on {parameter.device}"
    raise ShapeError(explain(passed, "as many values on the same device", change))


def _keep(state: dict[str, Any], name: str, blocks: Blocks) -> None:
    state[name + CODES], state[name + SCALES] = blocks


def pieces(parameter: Tensor) -> Iterator[tuple[int, int]]:
    """Where the pieces of a parameter begin and end."""
    size = PIECE.get(parameter.device.type, _PIECE_ELSEWHERE)
    for start in range(0, parameter.numel(), size):
        yield start, min(start + size, parameter.numel())


def opened(state: Mapping[str, Any], moments: Moments, start: int, stop: int) -> dict[str, Tensor]:
    """The moments of a piece in FP32, [stop - start]."""
    found: dict[str, Tensor] = {}
    for name in moments:
        blocks = blocks_of(state, name)
        assert blocks is not None, "only moments in blocks are opened"
        found[name] = decode(part(blocks, start, stop))
    return found


def close(
    state: Mapping[str, Any],
    values: Mapping[str, Tensor],
    moments: Moments,
    *,
    start: int,
    step: int | Tensor,
    keep: Tensor | None,
) -> None:
    """Put the moments of a piece back; where `keep` [] is 0, those before stay bit by bit."""
    count = next(iter(values.values())).numel()
    limits = dither(start, count, step, next(iter(values.values())).device)
    for name, kind in moments.items():
        blocks = blocks_of(state, name)
        assert blocks is not None, "only moments in blocks are closed"
        made = encode(values[name].reshape(-1), kind, limits)
        for old, new in zip(part(blocks, start, start + count), made, strict=True):
            old.copy_(new if keep is None else torch.where(keep > 0, new, old))
