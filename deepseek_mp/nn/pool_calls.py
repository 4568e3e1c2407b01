"""Which calls of PyTorch's max pooling `ops.max_pool` takes over, in eager code and in captured graphs.

Of four dimensions, with channels innermost in memory (channels_last) and enough of them for a kernel to move many bytes
at once; of a type and size that the kernels know, dilation 1, without indices. Whether a gradient is wanted is asked
by who replaces a call: pools that only evaluate stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.ops.max_pool import fastest
from deepseek_mp.ops.pool_window import MOST_CELLS

FEWEST_CHANNELS = 8
"""Of 16 bits, what a thread moves at once. Not measured."""
_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_DEFAULTS = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}

Choice = Callable[[torch.device, torch.dtype], str | None]
"""The implementation for a device and a type; None: such pools stay."""


def taken_over(
    args: Sequence[Any], kwargs: Mapping[str, Any], value_of: Callable[[Any], Any], choose: Choice = fastest
) -> tuple[Any, ...] | None:
    """The arguments of our op for a call of PyTorch's pool that it takes over; None: the call stays.

    Args:
        args: of `torch.nn.functional.max_pool2d`, with `kwargs`.
        kwargs: see `args`.
        value_of: the tensor behind an argument, real or one that only has the shape.
        choose: the implementation.
    """
    given = {**_DEFAULTS, **dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    if set(given) != set(_ARGUMENTS) or given["return_indices"] is not False:
        return None
    window, value = _window(given), value_of(given["input"])
    if window is None or not isinstance(value, Tensor) or not _suits(value):
        return None
    implementation = choose(value.device, value.dtype)
    return None if implementation is None else (given["input"], *window, given["ceil_mode"], implementation)


def _window(given: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel, stride and padding as pairs; None where our op has no such pool, or PyTorch's none either."""
    kernel, padding, dilation = (_pair(given[name]) for name in ("kernel_size", "padding", "dilation"))
    stride = kernel if given["stride"] in (None, (), []) else _pair(given["stride"])
    if kernel is None or stride is None or padding is None or dilation != [1, 1]:
        return None
    if min(*kernel, *stride) < 1 or kernel[0] * kernel[1] > MOST_CELLS:
        return None
    if any(not 0 <= 2 * pad <= size for pad, size in zip(padding, kernel, strict=True)):
        return None
    return (kernel, stride, padding) if isinstance(given["ceil_mode"], bool) else None


def _pair(size: Any) -> list[int] | None:
    """None for what is not known now but computed in the graph."""
    numbers = list(size) if isinstance(size, (list, tuple)) else [size]
    if len(numbers) not in (1, 2) or not all(type(number) is int for number in numbers):
        return None
    return numbers * 2 if len(numbers) == 1 else numbers


def _suits(value: Tensor) -> bool:
    """Whether it is a tensor as our op takes it, and PyTorch's outputs would have their channels innermost as ours."""
    if value.layout is not torch.strided or value.dim() != 4:
        return False
    _images, channels, height, width = value.shape
    by_image, by_channel, by_row, by_column = value.stride()
    if by_channel != 1 or not isinstance(channels, int) or channels < FEWEST_CHANNELS:
        return False
    return bool(by_column >= channels and by_row >= by_column * width and by_image >= by_row * height)
