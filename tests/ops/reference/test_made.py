"""The casts that compute their tensor, in plain PyTorch, against float64."""

import pytest
import torch

from deepseek_mp.ops.layouts import ALIGNMENT
from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.made import (
    quantise_gate_grads,
    quantise_gate_grads_delayed,
    quantise_made,
    quantise_made_delayed,
)
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.sources import ACTIVATIONS, SOURCES, compute

HALF_A_STEP = {"fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3}
SMALLEST_HALF = {"fp8_e4m3": 2.0**-10, "fp8_e5m2": 2.0**-17}


def drawn(number, count=40, width=256):
    return [(torch.randn(count, width) * 2).bfloat16() for _ in range(number)]


def assert_holds(made, inputs, source, format, granularity):
    """Both layouts stand for the source's exact values, as closely as the format can."""
    exact = compute(source, [tensor.double() for tensor in inputs])
    for (values, scale), expected in ((made[:2], exact), (made[2:], exact.t())):
        outer = expected.shape[0]
        held = dequantise(values, scale, granularity).double()
        held = held[:outer, : expected.shape[1]]
        steps = dequantise(torch.ones(values.shape), scale, granularity).double()[:outer, : expected.shape[1]]
        allowed = expected.abs() * HALF_A_STEP[format] + steps * SMALLEST_HALF[format] + 1e-5
        assert ((held - expected).abs() <= allowed).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("format", HALF_A_STEP)
def test_what_is_cast_is_the_source_to_the_precision_of_the_format(source, granularity, format):
    inputs = drawn(SOURCES[source].inputs)
    made = quantise_made(inputs, source, Cast(format, granularity, False, True, True))
    assert_holds(made, inputs, source, format, granularity)


@pytest.mark.parametrize("source", SOURCES)
def test_a_delayed_scale_holds_its_magnitude_and_notes_the_sources(source):
    inputs = drawn(SOURCES[source].inputs)
    largest = compute(source, inputs).abs().max()
    for top in (torch.zeros(()), largest.clone()):
        amax = torch.zeros(())
        made = quantise_made_delayed(inputs, source, top, amax, Cast("fp8_e4m3", "tensor", False, True, True))
        assert_holds(made, inputs, source, "fp8_e4m3", "tensor")
        assert amax == largest
    amax = largest * 2
    (q, s, _, _) = quantise_made_delayed(
        inputs, source, largest / 4, amax, Cast("fp8_e4m3", "tensor", False, True, True)
    )
    assert amax == largest * 2
    assert float(s) == pytest.approx(float(largest) / 4 / 448)
    assert q.float().abs().max() == 448


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", ["128x128", "row"])
def test_gate_gradients_are_those_to_x_and_then_to_up(activation, granularity):
    x, up, g = drawn(3)
    made = quantise_gate_grads((x, up, g), activation, Cast("fp8_e5m2", granularity, False, True, True), None)
    assert len(made) == 10
    assert_holds(made[:4], (x, up, g), f"{activation}_gate_grad", "fp8_e5m2", granularity)
    assert_holds(made[4:8], (x, g), f"{activation}_gate", "fp8_e5m2", granularity)
    assert [tensor.shape for tensor in made[8:]] == [(0,), (0,)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_value_is_made_beside_its_gradients_in_a_format_of_its_own(activation):
    x, up, g = drawn(3)
    cast = Cast("fp8_e5m2", "128x128", False, True, True)
    made = quantise_gate_grads((x, up, g), activation, cast, "fp8_e4m3")
    alone = quantise_made((x, up), f"{activation}_gate", cast._replace(format="fp8_e4m3"))
    assert torch.equal(made[8].view(torch.uint8), alone[2].view(torch.uint8))
    assert torch.equal(made[9], alone[3])
    for top in (0.0, 50.0):
        tops = torch.zeros(()), torch.zeros(()), torch.tensor(top)
        maxima = torch.zeros(()), torch.zeros(())
        made = quantise_gate_grads_delayed(
            (x, up, g), activation, tops, maxima, cast._replace(granularity="tensor"), "fp8_e4m3"
        )
        how = Cast("fp8_e4m3", "tensor", False, True, True)
        alone = quantise_made_delayed((x, up), f"{activation}_gate", tops[2], torch.zeros(()), how)
        assert torch.equal(made[8].view(torch.uint8), alone[2].view(torch.uint8))
        assert torch.equal(made[9], alone[3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_gate_gradient_has_a_delayed_scale_of_its_own(activation):
    x, up, g = drawn(3)
    tops, maxima = (torch.zeros(()), torch.tensor(1e4), None), (torch.zeros(()), torch.zeros(()))
    cast = Cast("fp8_e4m3", "tensor", False, True, True)
    made = quantise_gate_grads_delayed((x, up, g), activation, tops, maxima, cast, None)
    assert_holds(made[:4], (x, up, g), f"{activation}_gate_grad", "fp8_e4m3", "tensor")
    assert_holds(made[4:8], (x, g), f"{activation}_gate", "fp8_e4m3", "tensor")
    assert maxima[0] == compute(f"{activation}_gate_grad", (x, up, g)).abs().max()
    assert maxima[1] == compute(f"{activation}_gate", (x, g)).abs().max()
    assert float(made[5]) == pytest.approx(1e4 / 448)


def test_infinities_and_nan_of_any_input_become_nan_and_spoil_no_other_row():
    x, up, g = drawn(3)
    x[1, 3], up[2, 4], g[3, 5] = float("nan"), float("inf"), float("-inf")
    q = quantise_made((x, up, g), "silu_gate_grad", Cast("fp8_e4m3", "128x128", False, True, True))[0].float()
    assert q.isnan().nonzero().tolist() == [[1, 3], [2, 4], [3, 5]]


def test_added_rows_are_zeros():
    made = quantise_made(drawn(1), "gelu", Cast("fp8_e4m3", "128x128", False, True, True))
    assert (made[0][40:].float() == 0).all()
    assert (made[2][:, 40:].float() == 0).all()
