"""The library's product against the reference, as far as a CPU has it."""

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.native import product as module
from deepseek_mp.ops.native.product import PAIRS, product
from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.product import product as reference
from deepseek_mp.ops.reference.quantise import quantise

ON_CPU = [("tensor", "tensor"), ("row", "row")]


def operands(pair, outer=48, contraction=256, inner=64):
    left = quantise(torch.randn(outer, contraction), Cast("fp8_e4m3", pair[0], False, True, False))[:2]
    return *left, *quantise(torch.randn(inner, contraction), Cast("fp8_e4m3", pair[1], False, True, False))[:2]


@pytest.mark.parametrize("pair", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_it_agrees_with_the_reference(pair, dtype, biased):
    quantised = operands(pair)
    bias = torch.randn(64, dtype=dtype) if biased else None
    made = product(*quantised, pair, bias, dtype)
    assert made.dtype is dtype
    expected = reference(*quantised, pair, bias, torch.float32)
    # FP32 sums in two orders differ by a few units in the last place of what was added up, not of the sum.
    magnitudes = reference(
        quantised[0].abs(), quantised[1], quantised[2].abs(), quantised[3], pair, None, torch.float32
    )
    rounding = 2**-7 if dtype is torch.bfloat16 else 2**-22
    assert ((made.float() - expected).abs() <= rounding * expected.abs() + 2**-21 * magnitudes).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_nothing_times_something_is_nothing(pair):
    _, _, right, rs = operands(pair, contraction=128, inner=128)
    left, ls = quantise(torch.empty(0, 128), Cast("fp8_e4m3", pair[0], False, True, False))[:2]
    assert product(left, ls, right, rs, pair, None, torch.bfloat16).shape == (0, 128)


def test_other_pairs_are_refused():
    quantised = operands(("row", "tensor"))
    with pytest.raises(ConfigError, match="a native product of row with tensor scales"):
        product(*quantised, ("row", "tensor"), None, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_scaled_after_the_product_agree_too(monkeypatch, dtype, biased):
    """What runs where the library's row scales give bf16 only; rows differ by decades."""
    monkeypatch.setattr(module, "_has_row_scales", lambda device, dtype: False)
    left = torch.randn(48, 256) * 10.0 ** torch.linspace(-3, 0, 48)[:, None]
    right = torch.randn(64, 256) * 10.0 ** torch.linspace(-1, 0, 64)[:, None]
    quantised = [t for x in (left, right) for t in quantise(x, Cast("fp8_e4m3", "row", False, True, False))[:2]]
    bias = torch.randn(64) if biased else None
    made = product(*quantised, ("row", "row"), bias, dtype)
    expected = reference(*quantised, ("row", "row"), bias, torch.float32)
    assert made.dtype is dtype
    rounding = 2**-10 if dtype is torch.float16 else 1e-6
    # Sums are as accurate as their largest terms, which differ by row and column.
    terms = left.abs().amax(1, keepdim=True) * right.abs().amax(1)
    assert ((made.float() - expected).abs() <= rounding * expected.abs() + 1e-5 * terms + 2**-25).all()


@pytest.mark.parametrize(
    ("capability", "cuda", "expected"),
    [((9, 0), "12.9", True), ((9, 0), "13.0", True), ((9, 0), "12.8", False), ((8, 9), "13.0", False),
     ((10, 0), "13.0", False), ((9, 4), None, False)],
)  # fmt: skip
def test_row_scales_give_other_types_than_bf16_on_hopper_since_cuda_12_9(monkeypatch, capability, cuda, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    device = torch.device("cuda", 0)
    assert module._has_row_scales.__wrapped__(device, torch.float32) is expected
    assert module._has_row_scales.__wrapped__(device, torch.bfloat16)
    assert not module._has_row_scales.__wrapped__(torch.device("cpu"), torch.bfloat16)
