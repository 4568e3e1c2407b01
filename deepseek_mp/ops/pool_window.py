"""The window of a 2d pool: its size, its steps, and what tensors it makes of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, ShapeError, explain

Pair = tuple[int, int]
"""Down, across."""
MOST_CELLS = 255
"""Of a window: so that a place in it fits eight bits, and one number is left for none."""


@dataclass(frozen=True, kw_only=True)
class PoolWindow:
    """Which inputs each output of a pool looks at; dilation is 1, and beyond the edges is -inf."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool

    @classmethod
    def of(cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool) -> PoolWindow:
        """The window, checked.

        Raises:
            ConfigError: a size is not a pair, a kernel or stride is below 1, the padding is more than half of the
                kernel, or the kernel has more than 255 cells.
        """
        if any(len(pair) != 2 for pair in (kernel, stride, padding)):
            passed = f"kernel {list(kernel)}, stride {list(stride)}, padding {list(padding)}"
            raise ConfigError(explain(passed, "pairs: down, across", "Pass two numbers for each"))
        (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
        if min(kh, kw, sh, sw) < 1 or not (0 <= 2 * ph <= kh and 0 <= 2 * pw <= kw):
            passed = f"kernel {kh}x{kw}, stride {sh}x{sw}, padding {ph}x{pw}"
            allowed = "kernel and stride from 1, padding from 0 to half of the kernel"
            raise ConfigError(explain(passed, allowed, "Change what is out of range"))
        if kh * kw > MOST_CELLS:
            passed = f"a pool's kernel of {kh}x{kw}"
            raise ConfigError(explain(passed, f"up to {MOST_CELLS} cells", "Use torch.nn.functional.max_pool2d"))
        return cls(kernel=(kh, kw), stride=(sh, sw), padding=(ph, pw), ceil_mode=ceil_mode)

    def output_size(self, height: int, width: int) -> Pair:
        """Height and width of the outputs, as PyTorch counts them: the last window begins in the input or before it."""
        return self._along(0, height), self._along(1, width)

    def _along(self, axis: int, size: int) -> int:
        kernel, stride, padding = self.kernel[axis], self.stride[axis], self.padding[axis]
        count = (size + 2 * padding - kernel + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        return count - 1 if self.ceil_mode and (count - 1) * stride >= size + padding else count

    def places(self, offsets: Tensor, width: int) -> Tensor:
        """Where in its image, row * width + column, the cell is that each output names; int64.

        Args:
            offsets: [N, C, H', W'], as `ops.max_pool.max_pool2d` gives them.
            width: of the input.
        """
        cell = offsets.long()
        corners = (
            torch.arange(count, device=offsets.device) * stride - padding
            for count, stride, padding in zip(offsets.shape[2:], self.stride, self.padding, strict=True)
        )
        top, left = corners
        return (cell // self.kernel[1] + top[:, None]) * width + cell % self.kernel[1] + left

    def empty_results(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and offsets for x [N, C, H, W], not written yet, channels_last.

        Raises:
            ShapeError: x has another number of dimensions, or is smaller than the window.
            ConfigError: x is not floating.
        """
        if x.dim() != 4:
            raise ShapeError(explain(f"a pool of {list(x.shape)}", "[N, C, H, W]", "Add the missing dimension"))
        if not x.is_floating_point():
            raise ConfigError(explain(f"a pool of {x.dtype}", "floating types", "Convert it first"))
        batch, channels, height, width = x.shape
        down, across = self.output_size(height, width)
        if down < 1 or across < 1:
            passed = f"a {self.kernel[0]}x{self.kernel[1]} pool of {height}x{width}"
            raise ShapeError(explain(passed, "at least one whole window", "Pad the input, or use a smaller kernel"))
        shape = batch, channels, down, across
        return channels_last(shape, x, x.dtype), channels_last(shape, x, torch.uint8)


def channels_last(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor on the device of `like` whose channels are innermost in memory."""
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
