"""Max pooling of channels_last tensors by Triton: one launch forward, one backward.

Times have not been measured yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from deepseek_mp.errors import ShapeError, explain
from deepseek_mp.ops.pool_window import Pair, PoolWindow, channels_last
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.max_pool_kernel import max_pool_backward_kernel, max_pool_kernel

WARPS = 4
_LANES = 32
_BYTES = 16
"""What a thread reads or writes at once. Each has that many of the widest tensor: so no layouts are converted."""
_MOST_CHANNELS = 64
"""Of a program: 128 bytes in 16 bits, a line of a GPU's memory."""
_UNROLLED = 25
"""Cells of the largest window, and inputs of the largest block, whose code is written out for each."""
_POSITIONS = 2**31


def max_pool2d(x: Tensor, window: PoolWindow) -> tuple[Tensor, Tensor]:
    """See `ops.max_pool.max_pool2d`."""
    values, offsets = window.empty_results(x)
    x = _innermost(x)
    batch, channels, down, across = values.shape
    count = batch * down * across
    if values.numel():
        tile = _tile(x, count, window)
        with on_device(x.device):
            max_pool_kernel[_grid(tile, count, channels)](
                x, values, offsets, count, channels, *x.shape[2:], down, across, *_apart(x), **_sizes(window), **tile,
                num_warps=WARPS,
            )  # fmt: skip
    return values, offsets


def max_pool2d_backward(g: Tensor, offsets: Tensor, size: Pair, window: PoolWindow) -> Tensor:
    """See `ops.max_pool.max_pool2d_backward`."""
    g, offsets = _innermost(g), offsets.contiguous(memory_format=torch.channels_last)
    batch, channels, down, across = g.shape
    out = channels_last((batch, channels, *size), g, g.dtype)
    axes = zip(size, window.stride, window.padding, strict=True)
    rows, columns = ((length - 1 + padding) // stride - padding // stride + 1 for length, stride, padding in axes)
    count = batch * rows * columns
    if out.numel():
        tile = _tile(g, count, window)
        with on_device(g.device):
            max_pool_backward_kernel[_grid(tile, count, channels)](
                g, offsets, out, count, channels, *size, down, across, rows, columns, *_apart(g), **_sizes(window),
                **tile, num_warps=WARPS,
            )  # fmt: skip
    return out


def _innermost(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def _apart(x: Tensor) -> tuple[int, int, int]:
    """Numbers between images, rows and columns."""
    by_image, _, by_row, by_column = x.stride()
    return by_image, by_row, by_column


def _sizes(window: PoolWindow) -> dict[str, int]:
    names = ("KH", "KW", "SH", "SW", "PH", "PW")
    return dict(zip(names, (*window.kernel, *window.stride, *window.padding), strict=True))


def _tile(x: Tensor, count: int, window: PoolWindow) -> dict[str, Any]:
    """How much a program has, and how its code is written."""
    values = WARPS * _LANES * _BYTES // x.element_size()
    channels = min(_MOST_CHANNELS, triton.next_power_of_2(x.shape[1]))
    positions = values // channels
    if count + positions > _POSITIONS:
        passed = f"a pool of {count} positions"
        raise ShapeError(explain(passed, f"below {_POSITIONS}: they are counted in 32 bits", "Use smaller batches"))
    largest = max(window.kernel[0] * window.kernel[1], window.stride[0] * window.stride[1])
    return {"UNROLLED": largest <= _UNROLLED, "POSITIONS": positions, "CHANNELS": channels}


def _grid(tile: dict[str, Any], count: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(count, tile["POSITIONS"]), triton.cdiv(channels, tile["CHANNELS"])
