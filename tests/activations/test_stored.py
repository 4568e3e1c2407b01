from __future__ import annotations

import pytest
import torch

from deepseek_mp.activations.compress import mask_bits, rounded
from deepseek_mp.activations.stored import Bits, Geometry, Kept, check_version, version_of
from deepseek_mp.ops.packing import pack_bits


def test_kept_has_the_memory_of_the_tensor_and_no_history():
    x = torch.randn(4, requires_grad=True) * 2
    kept = Kept(x)
    assert kept.restore().data_ptr() == x.data_ptr()
    assert kept.restore().grad_fn is None
    assert kept.nbytes == 16


def test_kept_refuses_what_was_written_to():
    x = torch.randn(4)
    kept = Kept(x)
    x[1:].mul_(2)  # a view counts too
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* is at version 1; expected version 0"):
        kept.restore()


def test_versions_are_compared():
    x = torch.zeros(2)
    check_version(x, version_of(x))
    with pytest.raises(RuntimeError, match="expected version 7"):
        check_version(x, 7)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 130])
def test_bits_are_exact_for_any_count(count):
    mask = torch.rand(count) < 0.5
    bits = mask_bits(mask)
    assert torch.equal(bits.restore(), mask)
    assert bits.nbytes == (count + 7) // 8


def test_bits_of_a_matrix_keep_its_strides_and_value():
    mask = torch.rand(6, 5) < 0.5
    x = torch.where(mask, 2.5, 0.0).bfloat16().t()
    one = torch.tensor(2.5, dtype=torch.bfloat16)
    restored = Bits(pack_bits(mask.flatten()), Geometry.of(x), one).restore()
    assert torch.equal(restored, x)
    assert restored.stride() == x.stride()
    assert restored.dtype is torch.bfloat16


def test_rounded_restores_dtype_shape_and_strides():
    for x in (
        torch.randn(40, 96, dtype=torch.bfloat16).t(),
        torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last),
    ):
        restored = rounded(x, 128, None).restore()
        assert (restored.dtype, restored.shape, restored.stride()) == (x.dtype, x.shape, x.stride())
        assert ((restored - x).norm() / x.norm()) ** 2 < 1e-3
