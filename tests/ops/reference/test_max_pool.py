"""Max pooling in plain PyTorch: which cell is named, and how often a gradient is rounded."""

from __future__ import annotations

import torch

from deepseek_mp.ops.pool_window import PoolWindow
from deepseek_mp.ops.reference.max_pool import max_pool2d, max_pool2d_backward

WINDOW = PoolWindow.of((3, 3), (1, 1), (1, 1), False)
NAN, INF = float("nan"), float("inf")


def test_cells_are_counted_from_the_corner_of_the_window():
    x = torch.tensor([[1.0, 2.0], [3.0, 3.0]]).view(1, 1, 2, 2)
    values, offsets = max_pool2d(x, WINDOW)
    assert values.flatten().tolist() == [3.0] * 4
    assert offsets.flatten().tolist() == [7, 6, 4, 3]


def test_the_last_nan_is_named_and_of_nothing_but_minus_infinity_the_first_inside():
    x = torch.tensor([[NAN, 9.0], [NAN, 1.0]]).view(1, 1, 2, 2)
    assert max_pool2d(x, WINDOW)[1].flatten().tolist() == [7, 6, 4, 3]
    values, offsets = max_pool2d(torch.full((1, 1, 2, 2), -INF), WINDOW)
    assert values.flatten().tolist() == [-INF] * 4
    assert offsets.flatten().tolist() == [4, 3, 1, 0]


def test_a_sum_is_rounded_once():
    x = torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)
    x[..., 1, 1] = 1.0
    values, offsets = max_pool2d(x, WINDOW)
    g = torch.full_like(values, 1.0)
    g[..., 0, 0] = 256.0  # to which bf16 cannot add ones one by one
    gradient = max_pool2d_backward(g, offsets, (3, 3), WINDOW)
    assert gradient.flatten().tolist() == [0.0] * 4 + [264.0] + [0.0] * 4
