"""The casts that compute their tensor, as torch sees them: schemas, shapes without data, refusals."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_mp.errors import ConfigError, FormatError, ShapeError
from deepseek_mp.ops.layouts import ALIGNMENT
from deepseek_mp.ops.schema import quantise
from deepseek_mp.ops.schema_made import (
    quantise_gate_grads,
    quantise_gate_grads_delayed,
    quantise_made,
    quantise_made_delayed,
)
from deepseek_mp.ops.sources import SOURCES

ops = torch.ops.deepseek_mp
LAYOUTS = [(True, True), (True, False), (False, True)]
HOW = {"format": "fp8_e4m3", "power_of_two": False, "rows": True, "columns": True, "implementation": "reference"}


def drawn(number, count=5, width=128):
    return [torch.randn(count, width) for _ in range(number)]


def shared_out(first, turn=0):
    """Some of the layouts, the others for the second of two cases; which, goes by turns."""
    return [layout for place, layout in enumerate(LAYOUTS) if ((place + turn) % 2 == 0) is first]


def layout_of(tensors):
    return [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors]


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("source", ["silu", "gelu_gate_grad"])
def test_quantise_made_is_a_well_formed_op(granularity, source):
    inputs = drawn(SOURCES[source].inputs)
    for rows, columns in shared_out(source == "silu", list(ALIGNMENT).index(granularity)):
        arguments = (inputs, source, "fp8_e4m3", granularity, False, rows, columns, "reference")
        torch.library.opcheck(ops.quantise_made.default, arguments)


@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("top", [0.0, 2.0])
def test_quantise_made_delayed_is_a_well_formed_op(count, top):
    for rows, columns in shared_out(top == 0.0, count):
        arguments = (drawn(2, count), "silu_gate", torch.tensor(top), torch.zeros(()), "fp8_e4m3", False, rows, columns)
        torch.library.opcheck(ops.quantise_made_delayed.default, arguments, {"implementation": "reference"})


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_quantise_gate_grads_is_a_well_formed_op(granularity):
    for value_format in (None, "fp8_e4m3"):
        for rows, columns in shared_out(value_format is None, list(ALIGNMENT).index(granularity)):
            arguments = (*drawn(3), "silu", "fp8_e5m2", granularity, False, rows, columns, "reference")
            torch.library.opcheck(ops.quantise_gate_grads.default, arguments, {"value_format": value_format})


@pytest.mark.parametrize("count", [0, 5])
def test_quantise_gate_grads_delayed_is_a_well_formed_op(count):
    scaling = (torch.tensor(2.0), torch.zeros(()), torch.tensor(0.0), torch.ones(()))
    for value in ({}, {"value_format": "fp8_e5m2", "value_top": torch.tensor(3.0)}):
        for rows, columns in shared_out(not value, count):
            arguments = (*drawn(3, count), *scaling, "relu", "fp8_e4m3", False, rows, columns)
            how = {"implementation": "reference", **value}
            torch.library.opcheck(ops.quantise_gate_grads_delayed.default, arguments, how)


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("count", [0, 1, 100, 256])
def test_shapes_without_data_are_those_of_the_data(granularity, count):
    expected = layout_of(quantise(*drawn(1, count), "fp8_e4m3", granularity, False, True, True, "reference"))
    how, x, nothing = HOW | {"granularity": granularity}, drawn(3, count), layout_of([torch.empty(0)])
    without = [layout_of([torch.empty(0, dtype=torch.float8_e4m3fn)])[0], *nothing]
    assert layout_of(quantise_made(x[:2], "silu_gate", **how)) == expected
    assert layout_of(quantise_gate_grads(*x, "silu", **how)) == expected * 2 + without
    assert layout_of(quantise_gate_grads(*x, "silu", **how, value_format="fp8_e4m3")) == expected * 2 + expected[2:]
    with FakeTensorMode():
        x = [torch.empty(count, 128) for _ in range(3)]
        assert layout_of(quantise_made(x[:2], "silu_gate", **how)) == expected
        both = quantise_gate_grads(*x, "silu", **how, value_format="fp8_e4m3")
        assert layout_of(both) == expected * 2 + expected[2:]
        assert layout_of(ops.quantise_made(inputs=x[:2], source="silu_gate", **how)) == expected


@pytest.mark.parametrize("count", [0, 1, 100])
def test_shapes_under_a_delayed_scale_are_those_of_tensor(count):
    expected = layout_of(quantise(*drawn(1, count), "fp8_e4m3", "tensor", False, True, True, "reference"))
    for fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
            x, one = drawn(3, count), torch.ones(())
            made = quantise_made_delayed(x[:1], "gelu", one, one.clone(), **HOW)
            scaling = {"x_top": one, "x_amax": one.clone(), "up_top": one, "up_amax": one.clone()}
            value = {"value_format": "fp8_e4m3", "value_top": one}
            both = quantise_gate_grads_delayed(*x, **scaling, activation="gelu", **HOW, **value)
        assert layout_of(made) == expected
        assert layout_of(both) == expected * 2 + expected[2:]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([torch.zeros(4, 128)], ConfigError, "1 tensors for the source 'silu_gate'.*Allowed: 2"),
        ([torch.zeros(4, 128), torch.zeros(8, 128)], ShapeError, r"shapes \[4, 128\] and \[8, 128\]"),
        (
            [torch.zeros(4, 128), torch.zeros(4, 128).half()],
            ConfigError,
            "torch.float32 on cpu and torch.float16 on cpu",
        ),
        ([torch.zeros(4, 128), torch.zeros(128, 4).t()], ShapeError, "Allowed: contiguous matrices"),
        ([torch.zeros(4, 72), torch.zeros(4, 72)], ShapeError, "multiples of 128"),
    ],
    ids=["count", "shape", "dtype", "strides", "width"],
)
def test_inputs_that_do_not_fit_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        quantise_made(inputs, "silu_gate", granularity="1x128", **HOW)


def test_unknown_names_are_refused():
    x, up, g = drawn(3)
    with pytest.raises(ConfigError, match="source 'tanh'"):
        quantise_made([x], "tanh", granularity="row", **HOW)
    with pytest.raises(ConfigError, match=r"activation 'silu_gate'.*Allowed: silu, gelu, gelu_tanh, relu"):
        quantise_gate_grads(x, up, g, "silu_gate", granularity="row", **HOW)
    with pytest.raises(ShapeError, match="granularity '2x2'"):
        quantise_made([x], "silu", granularity="2x2", **HOW)
    with pytest.raises(FormatError, match="format 'bf16' to quantise to"):
        quantise_made([x], "silu", granularity="row", **HOW | {"format": "bf16"})
    for name in ("fast", "native"):
        with pytest.raises(ConfigError, match=f"implementation '{name}' of made"):
            quantise_made([x], "silu", granularity="row", **HOW | {"implementation": name})


def test_magnitudes_that_are_no_fp32_scalars_are_refused():
    x, up, g = drawn(3)
    one, wrong = torch.ones(()), torch.ones(1)
    with pytest.raises(ShapeError, match=r"top of shape \[1\]"):
        quantise_made_delayed([x], "silu", wrong, one, **HOW)
    for name in ("x_top", "x_amax", "up_top", "up_amax"):
        scaling = {key: wrong if key == name else one.clone() for key in ("x_top", "x_amax", "up_top", "up_amax")}
        with pytest.raises(ShapeError, match=rf"{name} of shape \[1\]"):
            quantise_gate_grads_delayed(x, up, g, **scaling, activation="silu", **HOW)


def test_a_value_that_cannot_be_made_beside_its_gradients_is_refused():
    x, up, g = drawn(3)
    scaling = {name: torch.ones(()) for name in ("x_top", "x_amax", "up_top", "up_amax")}
    with pytest.raises(FormatError, match="format 'bf16' to quantise to"):
        quantise_gate_grads(x, up, g, "silu", granularity="row", **HOW, value_format="bf16")
    with pytest.raises(ConfigError, match="a value_format without a value_top"):
        quantise_gate_grads_delayed(x, up, g, **scaling, activation="silu", **HOW, value_format="fp8_e4m3")
    with pytest.raises(ShapeError, match=r"value_top of shape \[1\]"):
        quantise_gate_grads_delayed(
            x, up, g, **scaling, activation="silu", **HOW, value_format="fp8_e4m3", value_top=torch.ones(1)
        )
