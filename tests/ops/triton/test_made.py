"""The kernels that cast what they compute themselves, on a GPU, against the reference and against float64."""

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.schema_made import (
    quantise_gate_grads,
    quantise_gate_grads_delayed,
    quantise_made,
    quantise_made_delayed,
)
from deepseek_mp.ops.sources import ACTIVATIONS, SOURCES, compute

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
KINDS = ["1x128", "128x128", "delayed"]
SHAPES = [(256, 384), (1000, 256), (77, 128), (1, 128)]


def drawn(number, shape, dtype=torch.bfloat16, seed=0, spoiled=False):
    """Arguments up to 4, where fp32 leaves more of an activation than FP8 holds, whichever way it is computed."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = [torch.randn(shape, device="cuda", generator=generator).clamp(-4, 4) for _ in range(number)]
    for i, tensor in enumerate(tensors if spoiled else ()):
        tensor[1 + i, 3 + i] = float("inf")
        tensor[11 + i, 40 + i] = float("nan")
        tensor[21 + i, 90 + i] = float("-inf")
        tensor[shape[0] // 2] = 0
    return [tensor.to(dtype) for tensor in tensors]


def scalar(value):
    return torch.tensor(float(value), device="cuda")


def made(inputs, source, kind, implementation, *, top=0.0, format="fp8_e4m3", power_of_two=False, layouts=(True, True)):
    """The four results, and the magnitude that was noted."""
    how = {"format": format, "power_of_two": power_of_two, "rows": layouts[0], "columns": layouts[1]}
    how["implementation"] = implementation
    if kind != "delayed":
        return quantise_made(inputs, source, granularity=kind, **how), 0.0
    amax = scalar(0)
    return quantise_made_delayed(inputs, source, scalar(top), amax, **how), float(amax)


def both_made(inputs, activation, kind, implementation, *, tops=(0.0, 0.0), layouts=(True, True), value=None):
    """The ten results, and the magnitudes that were noted; `value` is the top of the value, if it is made too."""
    how = {"format": "fp8_e4m3", "power_of_two": False, "rows": layouts[0], "columns": layouts[1]}
    how |= {"implementation": implementation, "value_format": None if value is None else "fp8_e5m2"}
    if kind != "delayed":
        return quantise_gate_grads(*inputs, activation, granularity=kind, **how), [0.0, 0.0]
    if value is not None:
        how["value_top"] = scalar(value)
    maxima = scalar(0), scalar(0)
    scaling = {"x_top": scalar(tops[0]), "x_amax": maxima[0], "up_top": scalar(tops[1]), "up_amax": maxima[1]}
    return quantise_gate_grads_delayed(*inputs, **scaling, activation=activation, **how), [float(m) for m in maxima]


def numbers(values):
    """FP8 values counted in steps of the format from zero."""
    bits = values.view(torch.uint8).int()
    return torch.where(bits > 127, 128 - bits, bits)


def assert_alike(ours, expected):
    """Values at most one step apart, and that seldom; scales equal but for the last bits; NaN in the same places."""
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a.float().isnan(), b.float().isnan())
        finite = ~a.float().isnan()
        if a.dtype == torch.float32:
            # The reference loses digits of gelu below -3, which is all that a group of one value has.
            assert ((a - b).abs()[finite] <= 1e-5 * b[finite] + 1e-8).all()
        elif a.numel():
            apart = (numbers(a) - numbers(b)).abs()[finite]
            assert (apart <= 1).all()
            assert int((apart > 0).sum()) <= 2 + 2e-3 * a.numel()


@hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_kernel_makes_what_the_reference_makes(source, kind):
    for shape in SHAPES:
        inputs = drawn(SOURCES[source].inputs, shape, seed=shape[0])
        for top in (0.0, 5.0) if kind == "delayed" else (0.0,):
            (ours, noted), (expected, largest) = (
                made(inputs, source, kind, implementation, top=top) for implementation in ("triton", "reference")
            )
            assert_alike(ours, expected)
            assert noted == pytest.approx(largest, rel=1e-5)


@hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["silu_gate", "gelu_grad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_every_type_format_and_kind_of_scale(source, kind, dtype, format):
    inputs = drawn(SOURCES[source].inputs, (200, 256), dtype)
    for power_of_two in (False, True):
        ours, expected = (
            made(inputs, source, kind, implementation, format=format, power_of_two=power_of_two)[0]
            for implementation in ("triton", "reference")
        )
        assert_alike(ours, expected)


@hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_values_are_exact_to_the_precision_of_the_format_far_from_zero_too(source, kind):
    x, *others = drawn(SOURCES[source].inputs, (256, 256), torch.float32)
    inputs = [(x * 3).contiguous(), *others]
    (q, s, qt, st), _ = made(inputs, source, kind, "triton")
    exact = compute(source, [tensor.double() for tensor in inputs])
    rest = 1 + inputs[0].double().abs()  # of what nearly cancels, where a slope is zero
    for tensor in others:
        rest = rest * tensor.double().abs()
    granularity = "tensor" if kind == "delayed" else kind
    for values, scale, wanted, near in ((q, s, exact, rest), (qt, st, exact.t(), rest.t())):
        held = dequantise(values, scale, granularity).double()
        step = dequantise(torch.ones_like(held), scale, granularity).double()
        allowed = wanted.abs() * (2**-4 + 1e-4) + step * 2**-9 + near * 1e-6
        assert ((held - wanted).abs() <= allowed).all()


@hopper
@pytest.mark.parametrize("source", ["gelu", "gelu_tanh", "silu"])
def test_a_group_far_below_zero_keeps_its_values(source):
    """Where 1 + erf or 1 + tanh would have lost them."""
    x = torch.linspace(-9, -7, 128, device="cuda").repeat(128, 1)
    (q, s, _, _), _ = made([x], source, "1x128", "triton")
    wide = x.double()
    share = {
        "silu": wide.sigmoid(),
        "gelu": torch.erfc(-wide / 2**0.5) / 2,
        "gelu_tanh": (2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)).sigmoid(),
    }
    exact = wide * share[source]
    held = dequantise(q, s, "1x128").double()
    step = dequantise(torch.ones_like(held), s, "1x128").double()
    assert ((held - exact).abs() <= exact.abs() * (2**-4 + 1e-3) + step * 2**-9).all()


@hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_infinities_and_nan_are_nan_where_the_reference_has_them(source, kind):
    inputs = drawn(SOURCES[source].inputs, (200, 256), spoiled=True)
    (ours, noted), (expected, largest) = (made(inputs, source, kind, name) for name in ("triton", "reference"))
    assert expected[0].float().isnan().any()
    assert_alike(ours, expected)
    assert noted == pytest.approx(largest, rel=1e-5)


@hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_gradients_are_those_that_two_casts_make(activation, kind):
    for shape in SHAPES:
        for spoiled in (False, True)[: 1 + (shape[0] > 100)]:
            x, _, g = inputs = drawn(3, shape, seed=shape[0], spoiled=spoiled)
            for tops in ((0.0, 0.0), (3.0, 0.0), (0.0, 5.0), (3.0, 5.0)) if kind == "delayed" else ((0.0, 0.0),):
                ours, noted = both_made(inputs, activation, kind, "triton", tops=tops)
                to_x, x_largest = made(inputs, f"{activation}_gate_grad", kind, "triton", top=tops[0])
                to_up, up_largest = made([x, g], f"{activation}_gate", kind, "triton", top=tops[1])
                assert_alike(ours[:8], (*to_x, *to_up))
                assert [tensor.shape for tensor in ours[8:]] == [(0,), (0,)]
                assert noted == pytest.approx([x_largest, up_largest], rel=1e-6)
                expected, largest = both_made(inputs, activation, kind, "reference", tops=tops)
                assert_alike(ours, expected)
                assert noted == pytest.approx(largest, rel=1e-5)


@hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_value_beside_its_gradients_is_that_of_a_cast_of_its_own(activation, kind):
    for shape in SHAPES:
        for top in (0.0, 6.0) if kind == "delayed" else (0.0,):
            x, up, _ = inputs = drawn(3, shape, seed=shape[0], spoiled=shape[0] > 100)
            both, noted = both_made(inputs, activation, kind, "triton", tops=(3.0, 0.0), value=top)
            alone, alone_noted = both_made(inputs, activation, kind, "triton", tops=(3.0, 0.0))
            assert_alike(both[:8], alone[:8])
            assert noted == alone_noted
            for implementation in ("triton", "reference"):
                how = {"top": top, "format": "fp8_e5m2", "layouts": (False, True)}
                assert_alike(both[8:], made([x, up], f"{activation}_gate", kind, implementation, **how)[0][2:])


@hopper
@pytest.mark.parametrize("kind", KINDS)
def test_one_layout_is_that_of_both(kind):
    inputs = drawn(3, (300, 256))
    whole = made(inputs, "silu_gate_grad", kind, "triton")[0]
    both = both_made(inputs, "silu", kind, "triton")[0]
    for rows, columns in ((True, False), (False, True)):
        part = made(inputs, "silu_gate_grad", kind, "triton", layouts=(rows, columns))[0]
        pair = both_made(inputs, "silu", kind, "triton", layouts=(rows, columns))[0]
        for i, wanted in enumerate((rows, rows, columns, columns)):
            for got, full in ((part[i], whole[i]), (pair[i], both[i]), (pair[i + 4], both[i + 4])):
                if wanted:
                    assert_alike([got], [full])
                else:
                    assert got.shape == (0,)


@hopper
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_rows(kind):
    inputs = drawn(3, (0, 256))
    ours, noted = both_made(inputs, "silu", kind, "triton")
    assert [tensor.shape for tensor in ours] == [
        tensor.shape for tensor in both_made(inputs, "silu", kind, "reference")[0]
    ]
    assert noted == [0.0, 0.0]
    single, noted = made(inputs[:1], "relu", kind, "triton")
    assert single[0].shape == (0, 256)
    assert noted == 0.0


@hopper
def test_a_known_magnitude_clips_what_is_beyond_and_is_only_raised():
    inputs = drawn(2, (256, 256))
    largest = float(compute("silu_gate", inputs).abs().max())
    amax = scalar(2 * largest)
    how = {"format": "fp8_e4m3", "power_of_two": False, "rows": True, "columns": True, "implementation": "triton"}
    q, s, _, _ = quantise_made_delayed(inputs, "silu_gate", scalar(largest / 4), amax, **how)
    assert float(amax) == pytest.approx(2 * largest)
    assert float(s) == pytest.approx(largest / 4 / 448)
    assert q.float().abs().max() == 448
    assert not q.float().isnan().any()


@hopper
def test_large_matrices_are_addressed_in_64_bits():
    """The last rows lie beyond 2**31 elements."""
    x = torch.zeros(2**31 // 4096 + 128, 4096, device="cuda", dtype=torch.bfloat16)
    x[-128:] = torch.randn(128, 4096, device="cuda")
    q, s, _, _ = made([x], "silu", "1x128", "triton", layouts=(True, False))[0]
    expected = made([x[-128:].contiguous()], "silu", "1x128", "triton", layouts=(True, False))[0]
    assert_alike([q[-128:], s[:, -128:]], expected[:2])


@hopper
def test_granularities_of_two_passes_are_refused():
    inputs = drawn(3, (16, 128))
    for granularity in ("tensor", "row", "1x32"):
        with pytest.raises(ConfigError, match=f"{granularity} scales for what triton computes itself"):
            made(inputs[:1], "silu", granularity, "triton")
        with pytest.raises(ConfigError, match=r"Allowed: 1x128, 128x128, delayed"):
            both_made(inputs, "silu", granularity, "triton")
