"""Products on a GPU: Triton's and the library's against the reference and against float64."""

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.layouts import PAIRS
from deepseek_mp.ops.native.product import PAIRS as NATIVE_PAIRS
from deepseek_mp.ops.schema import padded_rows, product, quantise

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
KERNELS = [("triton", pair) for pair in PAIRS] + [("native", pair) for pair in NATIVE_PAIRS]


def operands(pair, sizes, seed, positive=False, power_of_two=False):
    """Both operands of a product [A, C] x [B, C], quantised, and the float64 product of the originals."""
    outer, contraction, inner = sizes
    generator = torch.Generator("cuda").manual_seed(seed)
    left = torch.randn(outer, contraction, device="cuda", generator=generator)
    right = torch.randn(inner, contraction, device="cuda", generator=generator)
    if positive:
        left, right = left.abs(), right.abs()
    made = []
    for x, granularity in ((left, pair[0]), (right, pair[1])):
        made += quantise(x, "fp8_e4m3", granularity, power_of_two, True, False, "triton")[:2]
    return made, left.double() @ right.double().T


def relative_error(ours, expected):
    return float((ours.double() - expected).norm() / expected.norm())


@hopper
@pytest.mark.parametrize(("implementation", "pair"), KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(256, 256, 384), (128, 512, 128), (1024, 16384, 256)])
def test_products_agree_with_the_reference_and_with_float64(implementation, pair, dtype, sizes):
    (left, ls, right, rs), exact = operands(pair, sizes, seed=sum(sizes))
    ours = product(left, ls, right, rs, pair, None, dtype, implementation=implementation)
    emulated = product(left, ls, right, rs, pair, None, torch.float32, implementation="reference")
    assert ours.dtype is dtype
    rounding = 2e-3 if dtype is torch.bfloat16 else 3e-4  # bf16's own, and 14-bit partial sums
    assert relative_error(ours, emulated.double()) < rounding
    # Two operands of 2.65 % relative error each (E4M3 on Gaussian data).
    assert relative_error(ours, exact) < 1.1 * 0.0265 * 2**0.5


@hopper
@pytest.mark.parametrize("sizes", [(32, 32, 32), (160, 96, 64), (96, 1056, 288), (1000, 224, 160)])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_groups_of_32_need_no_whole_tiles(sizes, power_of_two, biased):
    pair = ("1x32", "1x32")
    (left, ls, right, rs), _ = operands(pair, sizes, seed=sum(sizes), power_of_two=power_of_two)
    bias = torch.randn(sizes[2], device="cuda") if biased else None
    ours = product(left, ls, right, rs, pair, bias, torch.float32, implementation="triton")
    emulated = product(left, ls, right, rs, pair, bias, torch.float32, implementation="reference")
    assert relative_error(ours, emulated.double()) < 3e-4


@hopper
def test_pairs_of_scales_that_the_kernel_does_not_read_are_refused():
    pair = ("1x32", "1x128")
    (left, ls, right, rs), _ = operands(pair, (128, 256, 128), seed=2)
    with pytest.raises(ConfigError, match=r"a Triton product of 1x32 with 1x128 scales.*Allowed: tensor with tensor"):
        product(left, ls, right, rs, pair, None, torch.float32, implementation="triton")


@hopper
@pytest.mark.parametrize(("implementation", "pair"), KERNELS)
def test_sums_of_one_sign_keep_their_accuracy(implementation, pair):
    """Long sums of positive numbers show what limited accumulators drop: errors do not cancel."""
    (left, ls, right, rs), _ = operands(pair, (256, 16384, 256), seed=3, positive=True)
    ours = product(left, ls, right, rs, pair, None, torch.float32, implementation=implementation)
    emulated = product(left, ls, right, rs, pair, None, torch.float32, implementation="reference")
    assert relative_error(ours, emulated.double()) < 2e-3


@hopper
@pytest.mark.parametrize("implementation", ["native", "triton"])
def test_a_bias_is_added(implementation):
    (left, ls, right, rs), _ = operands(("1x128", "128x128"), (256, 256, 384), seed=1)
    bias = torch.randn(384, device="cuda", dtype=torch.bfloat16)
    pair = ("1x128", "128x128")
    with_bias = product(left, ls, right, rs, pair, bias, torch.bfloat16, implementation=implementation)
    without = product(left, ls, right, rs, pair, None, torch.float32, implementation=implementation)
    torch.testing.assert_close(with_bias.float(), without + bias.float(), rtol=8e-3, atol=0.1)


@hopper
@pytest.mark.parametrize(("implementation", "pair"), KERNELS)
def test_no_rows_give_no_rows(implementation, pair):
    x = torch.empty(0, 256, device="cuda")
    q, s, _, _ = quantise(x, "fp8_e4m3", pair[0], False, True, True, "triton")
    assert q.shape == (padded_rows(0, pair[0]), 256)
    right, rs, _, _ = quantise(torch.randn(128, 256, device="cuda"), "fp8_e4m3", pair[1], False, True, False, "triton")
    made = product(q, s, right, rs, pair, None, torch.bfloat16, implementation=implementation)
    assert made.shape == (0, 128)
