"""Saved tensors in bits and FP8 groups by Triton, against plain PyTorch: the same bits.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed. The interpreter cuts numbers off
where BF16 is to be rounded to, so there BF16 is compared within that.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from deepseek_mp.ops.choose import packing_of
from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.quantise import quantise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = [1, 7, 8, 130, 4096, 4097, 20_000] + [3_000_001] * (not INTERPRETED)


def both(op, *args):
    """What the two implementations give."""
    return tuple(packing_of(op, name)(*args) for name in ("triton", "reference"))


def assert_same(ours, expected):
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    if INTERPRETED and ours.dtype is torch.bfloat16:
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0.0, equal_nan=True)
    else:
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [0, 1, 31])
def test_groups(group, dtype, left):
    rows = 200
    x = torch.randn(rows, group, device=DEVICE) * torch.logspace(-6, 4, rows, device=DEVICE)[:, None]
    x[3, 5], x[7, 0], x[11] = float("nan"), float("inf"), 0.0
    values, scale, _, _ = quantise(x, Cast("fp8_e4m3", f"1x{group}", False, True, False))
    rest = torch.randn(left, device=DEVICE).to(dtype) if left else None
    assert_same(*both("unpack_groups", values, scale, rest, rows * group + left, dtype))


def test_every_code():
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(2, 128).view(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 0.37]], device=DEVICE)
    ours, expected = both("unpack_groups", codes, scale, None, 256, torch.float32)
    if INTERPRETED:  # it takes the codes of NaN for 480
        ours = torch.where(expected.isnan(), expected, ours)
    assert_same(ours, expected)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rule", ["above", "not_below"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_bits(count, rule, dtype):
    x = torch.randn(count, device=DEVICE)
    x[::3], x[::5] = 0.0, float("nan")
    x = x > 0 if dtype is torch.bool else x.to(dtype)
    ours, expected = both("pack_bits", x, rule)
    assert torch.equal(ours, expected)
    out = torch.float32 if dtype is torch.bool else dtype
    one = torch.tensor(1.25, device=DEVICE, dtype=out)
    assert_same(*both("unpack_bits", ours, count, dtype, None))
    assert_same(*both("unpack_bits", ours, count, out, one))


def test_a_view_that_begins_anywhere():
    x = torch.randn(1001, device=DEVICE).bfloat16()
    for start in (1, 2, 3):
        assert torch.equal(*both("pack_bits", x[start:], "above"))
