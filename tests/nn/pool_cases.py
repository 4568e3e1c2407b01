"""Shapes and windows of pools, and inputs with ties, NaN and infinities; for all tests of max pooling."""

from __future__ import annotations

import torch

CASES = {
    "of a ResNet": ((2, 16, 13, 14), 3, 2, 1, False),
    "of an SPPF": ((2, 24, 7, 6), 5, 1, 2, False),
    "halves": ((3, 8, 8, 10), 2, 2, 0, False),
    "a rest is left out": ((2, 8, 9, 11), 2, 2, 0, False),
    "a rest is taken in": ((2, 8, 9, 12), 2, 2, 0, True),
    "a rest with padding": ((1, 8, 10, 9), 3, 2, 1, True),
    "not square": ((2, 8, 9, 13), (3, 2), (1, 3), (1, 0), False),
    "steps beyond the window": ((2, 8, 11, 12), 2, 3, 1, True),
    "overlapping thrice": ((1, 8, 11, 12), (7, 3), (2, 1), (3, 1), True),
    "large": ((1, 8, 15, 14), 13, 1, 6, False),
    "one output": ((2, 8, 4, 4), 4, 4, 0, False),
    "many channels": ((1, 100, 5, 5), 3, 1, 1, False),
    "no image": ((0, 8, 4, 4), 2, 2, 0, False),
}
"""Shape, kernel, stride, padding, ceil_mode, as `torch.nn.functional.max_pool2d` takes them."""


def pair(size):
    return [size, size] if isinstance(size, int) else list(size)


def window(case):
    """The arguments of our ops behind the tensors."""
    _, kernel, stride, padding, ceil_mode = CASES[case]
    return pair(kernel), pair(stride), pair(padding), ceil_mode


def inputs(case, dtype, *, memory_format=torch.channels_last, device="cpu"):
    """Few different numbers, so that many windows have ties; here and there NaN and infinities, zeros of both signs."""
    shape = CASES[case][0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    drawn = torch.rand(shape, generator=generator)
    x[drawn < 0.04], x[drawn > 0.97] = float("nan"), float("inf")
    x[(drawn > 0.1) & (drawn < 0.3)] = -0.0
    x[:1, :4] = float("-inf")
    return x.to(device, memory_format=memory_format)


def gradient(shape, dtype, *, whole=False, device="cpu"):
    """With a NaN and zeros; `whole`: small whole numbers, whose sums every type holds, in whatever order."""
    generator = torch.Generator().manual_seed(1)
    g = torch.randint(-3, 4, shape, generator=generator) if whole else torch.randn(shape, generator=generator)
    g = g.to(dtype).to(device, memory_format=torch.channels_last)
    g[:, :, ::3, ::2] = -0.0
    if not whole:
        g[:1, 1:2, :1, :1] = float("nan")
    return g


def same(found, expected):
    """Equal in type, shape and every bit, but that one NaN is like another."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    nan = expected.isnan()
    return (
        (found.dtype, found.shape) == (expected.dtype, expected.shape)
        and torch.equal(found.isnan(), nan)
        and torch.equal(found.contiguous().view(bits)[~nan], expected.contiguous().view(bits)[~nan])
    )
