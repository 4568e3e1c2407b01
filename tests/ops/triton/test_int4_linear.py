"""Linear layers with weights in 4 bits by Triton, against plain PyTorch.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed. The interpreter cuts numbers off
where BF16 is to be rounded to.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.int4_linear import int4_linear, int4_weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of a result: one of its last bits."""


def agree(rows, channels, width, dtype, *, bias):
    weight = torch.randn(channels, width) * torch.rand(channels, 1) + torch.randn(channels, 1) / 8
    kept = [part.to(DEVICE) for part in int4_weight(weight)]
    x = torch.randn(rows, width).to(DEVICE, dtype)
    b = torch.randn(channels).to(DEVICE, dtype) if bias else None
    found = int4_linear(x, *kept, b, implementation="triton")
    expected = int4_linear(x, *kept, b, implementation="reference")
    assert found.dtype is dtype
    # Tiles have weights in the dtype of x, so that each product is off by half of a last bit of some 1.
    atol = 1e-5 * width**0.5 if rows == 1 else CLOSE[dtype] * 2 * width**0.5
    torch.testing.assert_close(found.float(), expected.float(), rtol=CLOSE[dtype], atol=atol)
    distance = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(distance) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("width", [384, 320, 160])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 65, 130])
def test_all_numbers_of_rows_and_sizes_of_groups(rows, width, dtype):
    if INTERPRETED and rows > 1 and dtype is torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of BF16 matrices as whole numbers")
    agree(rows, 40, width, dtype, bias=True)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("channels", "width"), [(1, 32), (7, 64), (129, 1152), (9, 2304), (16, 4128)])
def test_sizes_that_are_no_whole_tiles(rows, channels, width):
    agree(rows, channels, width, torch.float16, bias=False)


def test_inputs_in_another_order_and_empty_ones():
    kept = [part.to(DEVICE) for part in int4_weight(torch.randn(24, 64))]
    x = torch.randn(64, 6, device=DEVICE).half().t()
    found = int4_linear(x, *kept, None, implementation="triton")
    expected = int4_linear(x, *kept, None, implementation="reference")
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=2e-2)
    assert int4_linear(x[:0], *kept, None, implementation="triton").shape == (0, 24)


@pytest.mark.parametrize("rows", [1, 5])
def test_some_channels_of_a_larger_weight(rows):
    q, scale, zero = (part.to(DEVICE) for part in int4_weight(torch.randn(48, 384)))
    x = torch.randn(rows, 384).to(DEVICE, torch.float16)
    found = int4_linear(x, q[16:40], scale[:, 16:40], zero[:, 16:40], None, implementation="triton")
    whole = int4_linear(x, q, scale, zero, None, implementation="triton")
    torch.testing.assert_close(found, whole[:, 16:40])


def test_inputs_in_fp32_are_for_the_reference():
    kept = [part.to(DEVICE) for part in int4_weight(torch.randn(24, 64))]
    with pytest.raises(ConfigError, match=r"x in torch.float32 for the Triton kernel"):
        int4_linear(torch.randn(2, 64, device=DEVICE), *kept, None, implementation="triton")


@pytest.mark.skipif(INTERPRETED, reason="takes minutes where kernels are interpreted")
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
def test_large_layers(rows):
    agree(rows, 4096, 11008, torch.bfloat16, bias=False)
