"""Rows cast to FP8 by one launch, against the reference of `quantise`, bit for bit.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed. The interpreter does not
convert to FP8 as devices do: it takes some values to a wrong exponent, and NaN to a number. There few may differ.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from deepseek_mp.ops.choose import row_cast_of
from deepseek_mp.ops.schema import quantise

module = pytest.importorskip("deepseek_mp.ops.triton.row_cast", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"


def agree(x):
    values, scale = row_cast_of("triton")(x)
    expected, expected_scale, _, _ = quantise(x, "fp8_e4m3", "row", False, True, False, "reference")
    assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
    assert values.shape == expected.shape
    if INTERPRETED:
        finite = ~scale.isnan()
        found, expected = values[finite].float(), expected[finite].float()
        assert float(((found - expected).abs() > expected.abs() / 8 + 2**-9).float().mean()) < 0.02
        return
    assert torch.equal(values.float().nan_to_num(-1.0), expected.float().nan_to_num(-1.0))


@pytest.mark.skipif(INTERPRETED, reason="takes minutes where kernels are interpreted")
@pytest.mark.parametrize("shape", [(1, 4096), (512, 11008), (3, 16384), (2, 16400), (2, 40000)])
def test_large_layers(shape):
    agree(torch.randn(shape, device=DEVICE).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (3, 144), (17, 96), (1, 256), (2, 272), (1, 528)])
def test_rows_of_all_sizes(shape, dtype, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 256)
    x = torch.randn(shape) * 10 ** (torch.rand(shape[0], 1) * 6 - 4)
    agree(x.to(DEVICE, dtype))


def test_rows_that_are_not_finite_become_nan_and_no_other(monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 256)
    for width in (80, 288):
        x = torch.randn(6, width)
        x[1, 3], x[2, -1], x[3], x[4] = torch.nan, -torch.inf, 0.0, 1e-42
        x = x.to(DEVICE)
        agree(x)
        values, scale = row_cast_of("triton")(x)
        assert scale[:6].isnan().tolist() == [False, True, True, False, False, False]
        assert INTERPRETED or values[1:3].float().isnan().all()
        assert not values[6:].float().any()


def test_no_rows():
    values, scale = row_cast_of("triton")(torch.zeros(0, 64, device=DEVICE))
    assert (values.shape, scale.shape) == ((0, 64), (0,))
