"""The sizes that a pool's window makes of others are PyTorch's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from deepseek_mp.ops.max_pool import max_pool2d
from deepseek_mp.ops.pool_window import PoolWindow


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_number_of_outputs(ceil_mode):
    for kernel, stride, padding, size in itertools.product((1, 2, 3, 5), (1, 2, 3, 6), (0, 1, 2), range(5, 13)):
        if 2 * padding > kernel:
            continue
        expected = F.max_pool2d(torch.zeros(1, 1, size, size + 1), kernel, stride, padding, ceil_mode=ceil_mode)
        window = PoolWindow.of((kernel,) * 2, (stride,) * 2, (padding,) * 2, ceil_mode)
        assert window.output_size(size, size + 1) == tuple(expected.shape[2:])
        assert window.empty_results(torch.zeros(2, 8, size, size + 1))[0].shape == (2, 8, *expected.shape[2:])


def test_results_have_their_channels_innermost():
    values, offsets = PoolWindow.of((2, 2), (2, 2), (0, 0), False).empty_results(torch.zeros(2, 8, 4, 6).bfloat16())
    assert (values.dtype, offsets.dtype) == (torch.bfloat16, torch.uint8)
    assert values.stride() == offsets.stride() == (48, 1, 24, 8)


@pytest.mark.parametrize("how", [((3, 2), (2, 3), (1, 0), True), ((2, 2), (3, 2), (0, 1), False)])
def test_places_are_pytorch_s_indices(how):
    kernel, stride, padding, ceil_mode = how
    x = torch.randn(2, 8, 7, 10)
    _, expected = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
    _, offsets = max_pool2d(x, *how, implementation="reference")
    assert torch.equal(PoolWindow.of(*how).places(offsets, 10), expected)
