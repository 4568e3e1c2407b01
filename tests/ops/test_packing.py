"""What saved tensors are held in: there and back, without gradients."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.choose import packing_of
from deepseek_mp.ops.packing import pack_bits, unpack_bits, unpack_groups


@pytest.mark.parametrize("count", [1, 8, 1003])
def test_signs_there_and_back(count):
    x = torch.randn(count, requires_grad=True)
    packed = pack_bits(x)
    assert packed.numel() == (count + 7) // 8
    assert torch.equal(unpack_bits(packed, count, torch.bool), x > 0)


def test_groups_have_no_history():
    scale = torch.ones(1, 2, requires_grad=True)
    found = unpack_groups(torch.ones(2, 32).to(torch.float8_e4m3fn), scale, None, 64, torch.float16)
    assert not found.requires_grad
    assert torch.equal(found, torch.ones(64, dtype=torch.float16))


def test_an_implementation_that_is_not_there():
    with pytest.raises(ConfigError, match="implementation 'native' of packing"):
        packing_of("pack_bits", "native")
