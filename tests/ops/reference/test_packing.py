"""Bits and FP8 groups in plain PyTorch, against numbers written out."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.ops.reference import packing


def test_the_lowest_bit_is_the_first_value():
    x = torch.tensor([1.0, 0.0, -2.0, 3.0, float("nan"), 0.5, 0.0, 1.0, 7.0])
    assert packing.pack_bits(x, "above").tolist() == [0b10101001, 1]
    assert packing.pack_bits(x, "not_below").tolist() == [0b10111001, 1]
    assert packing.pack_bits(x > 0, "above").tolist() == [0b10101001, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_bits_come_back(dtype):
    packed = torch.tensor([0b00000101, 0b00000010], dtype=torch.uint8)
    found = packing.unpack_bits(packed, 10, dtype, None)
    assert found.dtype is dtype
    assert found.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 1]


def test_bits_of_another_number():
    found = packing.unpack_bits(torch.tensor([0b101], dtype=torch.uint8), 3, torch.float16, torch.tensor(1.5).half())
    assert found.dtype is torch.float16
    assert found.tolist() == [1.5, 0, 1.5]


def test_groups_and_what_is_left_of_the_last(monkeypatch):
    values = torch.ones(3, 32)
    values[1] = 2.0
    scale = torch.tensor([[1.0, 10.0, 99.0]])  # the third row was added
    rest = torch.tensor([7.0, 8.0]).bfloat16()
    expected = [1.0] * 32 + [20.0] * 32 + [7.0, 8.0]
    for piece in (1 << 22, 32):
        monkeypatch.setattr(packing, "PIECE", piece)
        found = packing.unpack_groups(values.to(torch.float8_e4m3fn), scale, rest, 66, torch.bfloat16)
        assert found.dtype is torch.bfloat16
        assert found.tolist() == expected
