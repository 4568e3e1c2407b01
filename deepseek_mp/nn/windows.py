"""A convolution as a matrix product: its input unfolded to the windows that the kernel sees, and summed back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.nn.conv1x1 import Convolution


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the windows of a convolution lie in its padded input; one number per spatial dimension each."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def count(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many windows an input of these spatial sizes has, per dimension: the sizes of the output."""
        along = zip(sizes, self.kernel_size, self.stride, self.dilation, strict=True)
        return tuple((size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in along)

    def unfolded(self, x: Tensor) -> Tensor:
        """The windows of x [N, C, ...] as rows [N * windows, kernel positions * C], channels innermost."""
        dims = len(self.kernel_size)
        for d in range(dims):
            x = x.unfold(2 + d, self.dilation[d] * (self.kernel_size[d] - 1) + 1, self.stride[d])
            x = x[..., :: self.dilation[d]]
        x = x.movedim(1, -1)  # [N, windows, positions, C]
        return x.reshape(math.prod(x.shape[: dims + 1]), -1)

    def summed_back(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Rows as `unfolded` gives them of an input of this shape, each value added where it came from."""
        batch, channels, *sizes = shape
        windows = self.count(sizes)
        parts = rows.view(batch, *windows, math.prod(self.kernel_size), channels)
        x = rows.new_zeros(batch, *sizes, channels)
        for i, position in enumerate(product(*map(range, self.kernel_size))):
            first = [at * dilation for at, dilation in zip(position, self.dilation, strict=True)]
            along = zip(first, windows, self.stride, strict=True)
            seen = tuple(slice(start, start + (n - 1) * stride + 1, stride) for start, n, stride in along)
            x[(slice(None), *seen)] += parts[..., i, :]
        return x.movedim(-1, 1)


def windows_of(module: Convolution) -> Windows:
    """The windows of a convolution without groups, in its input as `padded` gives it."""
    return Windows(_sizes(module.kernel_size), _sizes(module.stride), _sizes(module.dilation))


def padded(x: Tensor, module: Convolution) -> Tensor:
    """x [N, C, ...] with the padding that the convolution gives it, in its mode."""
    kernel, dilation, padding = module.kernel_size, module.dilation, module.padding
    around: list[int] = []
    for d in reversed(range(len(kernel))):  # as `F.pad` counts: the last dimension first
        if isinstance(padding, str):
            total = dilation[d] * (kernel[d] - 1) if padding == "same" else 0
            around += [total // 2, total - total // 2]
        else:
            around += [padding[d]] * 2
    if not any(around):
        return x
    return F.pad(x, around, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def as_rows(weight: Tensor) -> Tensor:
    """The weight [O, C, ...] as [O, kernel positions * C], in the order of `Windows.unfolded`."""
    return weight.movedim(1, -1).flatten(1)


def _sizes(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(values)
