"""The plain linear layer with a weight in 8 bits: exact where numbers are small, and rounded once."""

import pytest
import torch

from deepseek_mp.ops.reference.weight_only import weight_only_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [torch.int8, torch.float8_e4m3fn])
def test_small_whole_numbers_are_exact(dtype, kept):
    x = torch.tensor([[1.0, -2.0, 3.0]], dtype=dtype)
    q = torch.tensor([[1, 2, 3], [-4, 0, 8]]).to(kept)
    found = weight_only_linear(x, q, torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0], dtype=dtype))
    assert found.dtype is dtype
    assert found.tolist() == [[4.0, 39.0]]
    assert weight_only_linear(x, q, torch.tensor([0.5, 2.0]), None).tolist() == [[3.0, 40.0]]


def test_sums_are_wider_than_the_result():
    x = torch.ones(1, 1025, dtype=torch.bfloat16)  # BF16 has no 1025
    q = torch.ones(1, 1025, dtype=torch.int8)
    bias = torch.tensor([-1024.0])
    assert weight_only_linear(x, q, torch.ones(1), bias).item() == 1.0
