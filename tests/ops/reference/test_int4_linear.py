"""The plain linear layer with a weight in 4 bits: exact where numbers are small, and rounded once."""

import pytest
import torch

from deepseek_mp.ops.reference.int4_linear import int4_linear, packed, unpacked, widened


def test_codes_come_back():
    codes = torch.randint(0, 16, (3, 2, 64), dtype=torch.uint8)
    q = packed(codes)
    assert q.shape == (3, 64)
    assert q.is_contiguous()
    assert torch.equal(unpacked(q, 2), codes)
    assert int(q[1, 32 + 5]) == int(codes[1, 1, 5]) + 16 * int(codes[1, 1, 32 + 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_whole_numbers_are_exact(dtype):
    codes = torch.full((2, 2, 32), 8, dtype=torch.uint8)
    codes[0, 0, 3], codes[0, 1, 31], codes[1, 0, 3] = 15, 0, 9
    scale = torch.tensor([[2.0, 0.5], [1.0, 1.0]]).to(torch.bfloat16)
    zero = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).to(torch.bfloat16)
    weight = widened(packed(codes), scale, zero)
    assert weight[0, 3] == 14.0
    assert weight[0, 63] == -8.0
    assert weight[1, :32].tolist() == [1.0] * 3 + [1.5] + [1.0] * 28
    x = torch.zeros(1, 64, dtype=dtype)
    x[0, 3], x[0, 63] = 2.0, 1.0
    found = int4_linear(x, packed(codes), scale, zero, torch.tensor([1.0, -1.0], dtype=dtype))
    assert found.dtype is dtype
    assert found.tolist() == [[21.0, 2.0]]
