"""Max pooling in plain PyTorch, cell by cell of the window, for any device and floating type."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.ops.pool_window import Pair, PoolWindow, channels_last


@torch.no_grad()
def max_pool2d(x: Tensor, window: PoolWindow) -> tuple[Tensor, Tensor]:
    """See `ops.max_pool.max_pool2d`."""
    values, offsets = window.empty_results(x)
    down, across = values.shape[2:]
    top, left = window.padding
    below, right = (
        max(0, reach - size) for reach, size in zip(_reach(window, (down, across)), x.shape[2:], strict=True)
    )
    padded = F.pad(x, (left, right, top, below), value=float("-inf"))
    best = torch.full_like(values, float("-inf"))
    cell = _first_cells(window, (down, across), x.device).expand(values.shape)
    for number, row, column in _cells(window):
        value = padded[:, :, _every(row, down, window.stride[0]), _every(column, across, window.stride[1])]
        larger = (value > best) | value.isnan()
        best, cell = torch.where(larger, value, best), torch.where(larger, number, cell)
    return values.copy_(best), offsets.copy_(cell)


@torch.no_grad()
def max_pool2d_backward(g: Tensor, offsets: Tensor, size: Pair, window: PoolWindow) -> Tensor:
    """See `ops.max_pool.max_pool2d_backward`."""
    down, across = g.shape[2:]
    top, left = window.padding
    height, width = (
        max(reach, length) + pad
        for reach, length, pad in zip(_reach(window, (down, across)), size, window.padding, strict=True)
    )
    wide = torch.promote_types(g.dtype, torch.float32)
    total = g.new_zeros((*g.shape[:2], height, width), dtype=wide)
    for number, row, column in reversed(list(_cells(window))):  # so that each input meets its windows in their order
        part = total[:, :, _every(row, down, window.stride[0]), _every(column, across, window.stride[1])]
        part += torch.where(offsets == number, g.to(wide), 0.0)
    out = channels_last((*g.shape[:2], *size), g, g.dtype)
    return out.copy_(total[:, :, top : top + size[0], left : left + size[1]])


def _cells(window: PoolWindow) -> Iterable[tuple[int, int, int]]:
    """Number, row and column of each cell, in the order in which ties are decided."""
    height, width = window.kernel
    return ((row * width + column, row, column) for row in range(height) for column in range(width))


def _every(start: int, count: int, step: int) -> slice:
    return slice(start, start + (count - 1) * step + 1, step)


def _reach(window: PoolWindow, outputs: Pair) -> Pair:
    """Where the last window ends, counted from the input's own corner."""
    sizes = zip(outputs, window.stride, window.kernel, window.padding, strict=True)
    down, across = ((count - 1) * stride + kernel - padding for count, stride, kernel, padding in sizes)
    return down, across


def _first_cells(window: PoolWindow, outputs: Pair, device: torch.device) -> Tensor:
    """[H', W']: the first cell of each window that is inside the input: what is taken where all are -inf."""
    rows, columns = (
        (padding - torch.arange(count, device=device) * stride).clamp_(min=0)
        for count, stride, padding in zip(outputs, window.stride, window.padding, strict=True)
    )
    return rows[:, None] * window.kernel[1] + columns
