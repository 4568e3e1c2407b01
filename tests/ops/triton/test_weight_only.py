"""Linear layers with weights in 8 bits by Triton, against plain PyTorch.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed. The interpreter cuts numbers off
where BF16 is to be rounded to, so a result in BF16 may be the next one there.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.weight_only import quantised_weight, weight_only_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of a result: one of its last bits."""


def agree(rows, channels, width, format, dtype, *, bias):
    weight = torch.randn(channels, width) * torch.rand(channels, 1)
    q, scale = (part.to(DEVICE) for part in quantised_weight(weight, format))
    x = torch.randn(rows, width).to(DEVICE, dtype)
    b = torch.randn(channels).to(DEVICE, dtype) if bias else None
    found = weight_only_linear(x, q, scale, b, implementation="triton")
    expected = weight_only_linear(x, q, scale, b, implementation="reference")
    assert found.dtype is dtype
    # Sums of another order differ by fp32's last bits of their largest part.
    torch.testing.assert_close(found.float(), expected.float(), rtol=CLOSE[dtype], atol=1e-5 * width**0.5)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 64, 65, 130])
def test_all_numbers_of_rows(rows, format, dtype):
    if INTERPRETED and rows > 1 and dtype is torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of BF16 matrices as whole numbers")
    agree(rows, 40, 320, format, dtype, bias=True)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("channels", "width"), [(1, 1), (7, 33), (129, 1040), (16, 2048), (9, 9232)])
def test_sizes_that_are_no_whole_tiles(rows, channels, width):
    agree(rows, channels, width, "int8", torch.float16, bias=False)
    agree(rows, channels, width, "fp8", torch.float16, bias=True)


def test_inputs_in_another_order_and_empty_ones():
    q, scale = (part.to(DEVICE) for part in quantised_weight(torch.randn(24, 48), "int8"))
    x = torch.randn(48, 6, device=DEVICE).half().t()
    found = weight_only_linear(x, q, scale, None, implementation="triton")
    torch.testing.assert_close(found, weight_only_linear(x, q, scale, None, implementation="reference"))
    assert weight_only_linear(x[:0], q, scale, None, implementation="triton").shape == (0, 24)


def test_inputs_in_fp32_are_for_the_reference():
    q, scale = (part.to(DEVICE) for part in quantised_weight(torch.randn(24, 48), "int8"))
    with pytest.raises(ConfigError, match=r"x in torch.float32 for the Triton kernel"):
        weight_only_linear(torch.randn(2, 48, device=DEVICE), q, scale, None, implementation="triton")


@pytest.mark.skipif(INTERPRETED, reason="takes minutes where kernels are interpreted")
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
def test_large_layers(rows, format):
    agree(rows, 4096, 11008, format, torch.bfloat16, bias=False)
