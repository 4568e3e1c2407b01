"""The library's product with weights in 4 bits against the reference, and the order it reads them in."""

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.int4_linear import GROUPS, _native_is_right, int4_linear, int4_weight, prepared, unprepared
from deepseek_mp.ops.native import int4_linear as module

BF16 = torch.bfloat16
HAS = all(_native_is_right(torch.device("cpu"), group) for group in GROUPS)
needs_product = pytest.mark.skipif(not HAS, reason="this PyTorch has no right _weight_int4pack_mm for this CPU")


@needs_product
@pytest.mark.parametrize("shape", [(1, 128, 16), (3, 192, 32), (40, 160, 48), (0, 256, 16)])
def test_it_is_the_reference_rounded(shape):
    rows, width, channels = shape
    kept = int4_weight(torch.randn(channels, width))
    x = torch.randn(width, rows).to(BF16).t()
    for bias in (None, torch.randn(channels).to(BF16)):
        made = prepared(*kept, implementation="native")
        found = int4_linear(x, *made, bias, implementation="native")
        expected = int4_linear(x.float(), *kept, bias, implementation="reference")
        assert found.dtype is BF16
        # Each widened weight is rounded to BF16, and the sum, and the result.
        atol = 2**-7 * width**0.5 + 1e-5
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=atol)


@needs_product
def test_its_shape_is_known_to_the_compiler():
    made = prepared(*int4_weight(torch.randn(32, 192)), implementation="native")
    torch.library.opcheck(torch.ops.deepseek_mp.int4_linear, (torch.randn(3, 192).to(BF16), *made, None, "native"))


@needs_product
@pytest.mark.parametrize("width", [128, 192, 160])
def test_what_was_given_comes_back(width, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 48)
    kept = int4_weight(torch.randn(32, width) + 3)
    back = unprepared(*prepared(*kept, implementation="native"))
    assert all(torch.equal(one, other) for one, other in zip(back, kept, strict=True))


def test_what_the_library_does_not_take_is_refused():
    kept = int4_weight(torch.randn(24, 64))
    with pytest.raises(ConfigError, match="a native product of 24 channels"):
        prepared(*kept, implementation="native")
    with pytest.raises(ConfigError, match=r"a native product of torch\.float16"):
        module.int4_linear(torch.ones(1, 64).half(), kept[0], kept[1], None, None)
