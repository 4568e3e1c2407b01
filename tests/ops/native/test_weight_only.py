"""The library's product of BF16 and int8 on a CPU against the reference, and what it does not take."""

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.native.weight_only import weight_only_linear
from deepseek_mp.ops.reference.weight_only import weight_only_linear as reference
from deepseek_mp.ops.weight_only import fastest, quantised_weight

HAS = fastest(torch.device("cpu"), torch.bfloat16, "int8", 64) == "native"
needs_product = pytest.mark.skipif(not HAS, reason="this PyTorch has no right _weight_int8pack_mm for this CPU")


@needs_product
@pytest.mark.parametrize("shape", [(1, 64, 32), (3, 96, 33), (40, 256, 48), (5, 32, 1)])
def test_it_is_the_reference_rounded_twice(shape):
    rows, width, channels = shape
    q, scale = quantised_weight(torch.randn(channels, width), "int8")
    x = torch.randn(width, rows).to(torch.bfloat16).t()
    for bias in (None, torch.randn(channels).to(torch.bfloat16)):
        found = weight_only_linear(x, q, scale, bias)
        expected = reference(x.float(), q, scale, bias)
        assert found.dtype is torch.bfloat16
        # The sum is rounded before the bias comes to it, so that what cancels leaves an error of the sum's size.
        size = reference(x.float(), q, scale, None).abs() + expected.abs()
        assert bool(((found.float() - expected).abs() <= size * 2**-8 + 1e-5).all())


def test_of_nothing_there_is_the_bias():
    q, scale = torch.zeros(3, 0, dtype=torch.int8), torch.ones(3)
    found = weight_only_linear(torch.zeros(2, 0, dtype=torch.bfloat16), q, scale, torch.tensor([1.0, 2.0, 3.0]))
    assert found.tolist() == [[1.0, 2.0, 3.0]] * 2
    assert weight_only_linear(torch.zeros(0, 32, dtype=torch.bfloat16), q.new_zeros(3, 32), scale, None).shape == (0, 3)


def test_what_the_library_would_crash_on_is_refused():
    x, scale = torch.ones(2, 70, dtype=torch.bfloat16), torch.ones(3)
    q = torch.ones(3, 70, dtype=torch.int8)
    for wrong in ((x, q), (x[:, :64].float(), q[:, :64]), (x[:, :64], q[:, :64].to(torch.float8_e4m3fn))):
        with pytest.raises(ConfigError, match="a native product of"):
            weight_only_linear(*wrong, scale, None)
