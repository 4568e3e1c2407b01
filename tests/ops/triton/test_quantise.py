"""The cast kernels on a GPU, against the reference and against float64."""

import pytest
import torch

from deepseek_mp.errors import ShapeError
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.schema import quantise, quantise_delayed
from deepseek_mp.precision import find_format

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
GRANULARITIES = ["tensor", "row", "1x32", "1x128", "128x128"]
SHAPES = [(256, 384), (1000, 512), (77, 128), (1, 128)]
OF_GROUPS_OF_32 = [(160, 32), (33, 96), (1000, 224)]
CASES = [(granularity, shape) for granularity in GRANULARITIES for shape in SHAPES]
CASES += [("1x32", shape) for shape in OF_GROUPS_OF_32]


def hard_matrix(rows, columns, dtype, seed):
    """Rows over seven decades, a row and a column of zeros, an infinity and a NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, columns, device="cuda", generator=generator)
    x *= 10 ** (torch.rand(rows, 1, device="cuda", generator=generator) * 7 - 5)
    x[rows // 2] = 0
    x[:, columns // 5] = 0
    x[rows // 3, columns // 2] = float("inf")
    x[rows // 4, columns // 3] = float("nan")
    return x.to(dtype)


def assert_equal(ours, expected):
    assert ours.shape == expected.shape
    ours, expected = ours.float(), expected.float()
    same = (ours == expected) | (ours.isnan() & expected.isnan())
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ"


@hopper
@pytest.mark.parametrize(("granularity", "shape"), CASES)
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cast_kernel_gives_the_reference_bit_for_bit(granularity, shape, format, dtype):
    x = hard_matrix(*shape, dtype, seed=shape[0])
    for power_of_two in (False, True):
        ours = quantise(x, format, granularity, power_of_two, True, True, "triton")
        expected = quantise(x, format, granularity, power_of_two, True, True, "reference")
        for made, wanted in zip(ours, expected, strict=True):
            assert_equal(made, wanted)


@hopper
@pytest.mark.parametrize(("granularity", "shape"), CASES)
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 1, -3])
def test_a_seed_gives_the_reference_bit_for_bit(granularity, shape, format, seed):
    drawn = torch.tensor(seed, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        x = hard_matrix(*shape, dtype, seed=shape[0])
        for power_of_two in (False, True):
            ours = quantise(x, format, granularity, power_of_two, True, True, "triton", seed=drawn)
            expected = quantise(x, format, granularity, power_of_two, True, True, "reference", seed=drawn)
            for made, wanted in zip(ours, expected, strict=True):
                assert_equal(made, wanted)


@hopper
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("seeded", [False, True])
def test_one_layout_is_that_of_both(granularity, seeded):
    x = hard_matrix(640, 256, torch.bfloat16, seed=5)
    seed = torch.tensor(99, device="cuda") if seeded else None
    both = quantise(x, "fp8_e4m3", granularity, False, True, True, "triton", seed=seed)
    rows = quantise(x, "fp8_e4m3", granularity, False, True, False, "triton", seed=seed)
    columns = quantise(x, "fp8_e4m3", granularity, False, False, True, "triton", seed=seed)
    assert_equal(rows[0], both[0])
    assert_equal(rows[1], both[1])
    assert_equal(columns[2], both[2])
    assert_equal(columns[3], both[3])
    assert rows[2].numel() == columns[0].numel() == 0


@hopper
@pytest.mark.parametrize("offset", [0, 1, 2, 8])
def test_a_view_may_begin_anywhere(offset):
    held = torch.randn(offset + 300 * 256, device="cuda").bfloat16()
    x = held[offset:].view(300, 256)
    for made, wanted in zip(
        quantise(x, "fp8_e4m3", "1x128", False, True, True, "triton"),
        quantise(x, "fp8_e4m3", "1x128", False, True, True, "reference"),
        strict=True,
    ):
        assert_equal(made, wanted)


@hopper
def test_infinities_and_nan_spoil_their_group_of_32_and_no_other():
    x = torch.randn(256, 256, device="cuda")
    x[70, 200], x[135, 5] = float("inf"), float("nan")
    q, s, qt, st = quantise(x, "fp8_e4m3", "1x32", True, True, True, "triton")
    for values, scales, groups in ((q, s, {(70, 6), (135, 0)}), (qt, st, {(200, 2), (5, 4)})):
        assert {tuple(place) for place in scales.T.isnan().nonzero().tolist()} == groups
        spoiled = values.float().isnan().view(256, 8, 32)
        assert torch.equal(spoiled.any(2), spoiled.all(2))
        assert torch.equal(spoiled.all(2), scales.T.isnan())


def relative_error(ours, expected):
    return float((ours.double() - expected).norm() / expected.norm())


@hopper
def test_values_come_back_within_the_format():
    x = torch.randn(512, 512, device="cuda")
    q, s, _, _ = quantise(x, "fp8_e4m3", "1x128", False, True, False, "triton")
    back = dequantise(q, s, "1x128")
    assert relative_error(back, x.double()) < 1.1 * 0.0265
    assert float(q.float().abs().max()) == find_format("fp8_e4m3").max


@hopper
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 384), (1000, 512), (77, 128), (1, 128), (16, 48)])
@pytest.mark.parametrize("top", [0.0, 1e-3, 0.5, 1e30])
def test_a_delayed_scale_gives_the_reference_bit_for_bit(format, dtype, shape, top):
    x = hard_matrix(*shape, dtype, seed=shape[0])
    for layouts in ((True, True), (True, False), (False, True)):
        for power_of_two in (False, True):
            results, maxima = [], []
            for implementation in ("triton", "reference"):
                amax = torch.full((), 1e-4, device="cuda")
                known = torch.full((), top, device="cuda")
                results.append(
                    quantise_delayed(x, known, amax, format, power_of_two, *layouts, implementation=implementation)
                )
                maxima.append(float(amax))
            for ours, expected in zip(*results, strict=True):
                assert_equal(ours, expected)
            assert maxima[0] == maxima[1]


@hopper
def test_a_delayed_scale_of_the_own_maximum_gives_the_bits_of_tensor():
    x = torch.randn(512, 256, device="cuda")
    delayed = quantise_delayed(
        x, x.abs().max(), torch.zeros((), device="cuda"), "fp8_e4m3", False, True, True, implementation="triton"
    )
    for ours, expected in zip(delayed, quantise(x, "fp8_e4m3", "tensor", False, True, True, "triton"), strict=True):
        assert_equal(ours, expected)


@hopper
def test_a_delayed_cast_takes_no_rows():
    nothing = torch.zeros(0, 128, device="cuda")
    amax = torch.ones((), device="cuda")
    q, _, qt, _ = quantise_delayed(
        nothing, torch.zeros_like(amax), amax, "fp8_e4m3", False, True, True, implementation="triton"
    )
    assert (q.shape, qt.shape, float(amax)) == ((0, 128), (128, 0), 1.0)


@hopper
def test_a_delayed_scale_on_another_device_is_refused():
    x, on_host = torch.randn(16, 16, device="cuda"), torch.zeros(())
    with pytest.raises(ShapeError, match=r"on cpu.*Apply the plan again if the model was moved"):
        quantise_delayed(x, on_host, on_host, "fp8_e4m3", False, True, True, implementation="triton")
