"""Which calls of PyTorch's pool are taken over, and with which arguments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deepseek_mp.nn.pool_calls import taken_over

X = torch.zeros(2, 8, 6, 7).to(memory_format=torch.channels_last)


def asked(*args, **kwargs):
    return taken_over(args, kwargs, lambda leaf: leaf, lambda device, dtype: f"{device} {dtype}")


def test_the_arguments_are_those_of_our_op():
    ours = asked(X, 3, 2, padding=(1, 0), ceil_mode=True)
    assert ours is not None
    assert ours[0] is X
    assert ours[1:] == ([3, 3], [2, 2], [1, 0], True, "cpu torch.float32")


@pytest.mark.parametrize("stride", [None, [], ()])
def test_steps_are_those_of_the_window_where_none_are_given(stride):
    assert asked(X, (3, 2), stride)[2] == [3, 2]
    assert asked(X, (3, 2))[2] == [3, 2]


STAYING = {
    "indices": ((X, 2), {"return_indices": True}),
    "indices, by place": ((X, 2, 2, 0, 1, False, True), {}),
    "dilation": ((X, 2), {"dilation": (1, 2)}),
    "contiguous": ((X.contiguous(), 2), {}),
    "columns outside of rows": ((torch.zeros(2, 7, 6, 8).permute(0, 3, 2, 1), 2), {}),
    "an image, repeated": ((X[:1].expand(2, 8, 6, 7), 2), {}),
    "few channels": ((X[:, :7], 2), {}),
    "three dimensions": ((X[0], 2), {}),
    "no tensor": ((3, 2), {}),
    "a layout of its own": ((X.to_sparse(), 2), {}),
    "a kernel of many cells": ((X, 16), {}),
    "an argument that is not known": ((X, 2), {"out": X}),
    "padding of more than half": ((X, 3), {"padding": 2}),
    "no steps": ((X, 2, 0), {}),
    "a kernel that is computed": ((X, torch.tensor(2)), {}),
}


@pytest.mark.parametrize("case", STAYING)
def test_calls_that_stay(case):
    args, kwargs = STAYING[case]
    assert asked(*args, **kwargs) is None


def test_a_device_without_kernels_keeps_its_pools():
    assert taken_over((X, 2), {}, lambda leaf: leaf, lambda device, dtype: None) is None
    assert taken_over((X, 2), {}, lambda leaf: leaf) is None  # a CPU


def test_all_that_pytorch_takes_by_place_is_known():
    assert F.max_pool2d(X, 2, 2, 0, 1, False, False).shape == (2, 8, 3, 3)
    assert asked(X, 2, 2, 0, 1, False, False) is not None
