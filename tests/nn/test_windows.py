"""Unfolded convolutions: the product over windows is the convolution, and summing back is its transpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp.nn.windows import Windows, as_rows, padded, windows_of

SETTINGS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv1d, {"kernel_size": 4, "stride": 3, "padding": 2, "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "stride": 4}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    (nn.Conv3d, {"kernel_size": 2, "stride": (1, 2, 3), "padding": 1, "padding_mode": "replicate"}),
]


def made(kind: type[nn.Module], settings: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    return kind(4, 5, bias=False, **settings).double(), torch.randn(2, 4, *[9, 8, 7][:dims], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_windows_times_the_weight_are_the_convolution(kind: type[nn.Module], settings: dict[str, Any]) -> None:
    conv, x = made(kind, settings)
    whole, windows = padded(x, conv), windows_of(conv)
    y = windows.unfolded(whole) @ as_rows(conv.weight).t()
    expected = conv(x)
    assert windows.count(whole.shape[2:]) == expected.shape[2:]
    torch.testing.assert_close(y.view(2, *expected.shape[2:], 5).movedim(-1, 1), expected)


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_summing_back_is_the_gradient_of_unfolding(kind: type[nn.Module], settings: dict[str, Any]) -> None:
    conv, x = made(kind, settings)
    windows = windows_of(conv)
    whole = padded(x, conv).detach().requires_grad_()
    rows = windows.unfolded(whole)
    gradient = torch.randn_like(rows)
    (expected,) = torch.autograd.grad(rows, whole, gradient)
    torch.testing.assert_close(windows.summed_back(gradient, whole.shape), expected)


def test_channels_are_innermost() -> None:
    x = torch.arange(2 * 3 * 3.0).view(1, 2, 3, 3)
    rows = Windows((2, 2), (1, 1), (1, 1)).unfolded(x)
    assert rows[0].tolist() == [0, 9, 1, 10, 3, 12, 4, 13]
    assert rows.shape == (4, 8)


def test_what_needs_no_padding_is_not_copied() -> None:
    x = torch.randn(1, 2, 5, 5)
    assert padded(x, nn.Conv2d(2, 2, 3)) is x
    assert padded(x, nn.Conv2d(2, 2, 3, padding="valid")) is x
