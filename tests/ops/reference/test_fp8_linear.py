"""The plain linear layer in FP8: exact where FP8 holds the numbers, and rounded once."""

import pytest
import torch

from deepseek_mp.ops.reference.fp8_linear import fp8_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_fp8_holds_are_exact(dtype):
    x = torch.zeros(2, 16, dtype=dtype)
    x[0, :3] = torch.tensor([448.0, -2.0, 3.0])
    q = torch.zeros(16, 16)
    q[0, :3], q[1, :3] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-4.0, 0.0, 8.0])
    bias = torch.zeros(16, dtype=dtype)
    bias[:2] = torch.tensor([1.0, -8.0])
    scale = torch.full((16,), 0.5)
    found = fp8_linear(x, q.to(torch.float8_e4m3fn), scale, bias)
    assert found.dtype is dtype
    assert found[:, :3].tolist() == [[227.5 if dtype is torch.float32 else found[0, 0], -892.0, 0.0], [1.0, -8.0, 0.0]]
    assert abs(float(found[0, 0]) - 227.5) <= 0.5


def test_what_fp8_does_not_hold_is_rounded():
    x = torch.zeros(1, 16)
    x[0, :2] = torch.tensor([448.0, 17.0])  # 16 or 18, and 16 is even
    q = torch.zeros(16, 16)
    q[0, 1] = 1.0
    assert fp8_linear(x, q.to(torch.float8_e4m3fn), torch.ones(16), None)[0, 0] == 16.0
