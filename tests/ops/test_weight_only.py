"""Weights in 8 bits: how they are rounded, and the op that multiplies with them, in eager and in compiled code."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.ops import weight_only as module
from deepseek_mp.ops.choose import weight_only_of
from deepseek_mp.ops.weight_only import FORMATS, fastest, quantised_weight, weight_only_linear

CPU = torch.device("cpu")


@pytest.fixture
def operands():
    q, scale = quantised_weight(torch.randn(5, 64), "int8")
    return torch.randn(3, 64), q, scale, torch.randn(5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_is_the_nearest_of_its_row_s_values(format):
    weight = torch.randn(6, 40) * torch.tensor([1.0, 1e-3, 1e4, 3.0, 1e-30, 1.0])[:, None]
    q, scale = quantised_weight(weight, format)
    dtype, top = FORMATS[format]
    assert (q.dtype, scale.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(scale, weight.abs().amax(1) / top)
    assert torch.equal(q.float().abs().amax(1), torch.full((6,), top))
    error = (q.float() * scale[:, None] - weight).abs() / scale[:, None]
    # Half of a step: of 1 for int8; of E4M3's last bit, or of its smallest numbers, for fp8.
    bound = torch.full_like(weight, 0.5) if format == "int8" else (weight / scale[:, None]).abs() / 16 + 2**-10
    assert bool((error <= bound * 1.001).all())


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_nothing_and_next_to_nothing(format):
    weight = torch.tensor([[0.0, -0.0], [1e-45, 0.0], [1.0, -2.0]])
    q, scale = quantised_weight(weight, format)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert not q[:2].float().any()
    assert (q.float() * scale[:, None])[2, 1] == -2.0


def test_weights_are_rounded_from_their_own_dtype_and_memory_order():
    weight = torch.randn(8, 6).to(torch.bfloat16).t()
    q, scale = quantised_weight(weight, "int8")
    assert q.is_contiguous()
    for found, expected in zip((q, scale), quantised_weight(weight.float().contiguous(), "int8"), strict=True):
        assert torch.equal(found, expected)


def test_weights_that_are_none():
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ConfigError, match="head with values that are not finite"):
            quantised_weight(torch.tensor([[1.0, bad]]), "int8", "head")
    with pytest.raises(ConfigError, match="weights in 'int4'"):
        quantised_weight(torch.ones(2, 2), "int4")
    with pytest.raises(ShapeError, match=r"a weight \[2\] for 8 bits"):
        quantised_weight(torch.ones(2), "int8")


def test_it_is_the_linear_layer_of_the_rounded_weight(operands):
    x, q, scale, bias = operands
    found = weight_only_linear(x, q, scale, bias, implementation="reference")
    torch.testing.assert_close(found, F.linear(x, q.float() * scale[:, None], bias))


def test_the_compiler_is_told_the_truth(operands):
    x, q, scale, bias = operands
    for given in (bias, None):
        torch.library.opcheck(torch.ops.deepseek_mp.weight_only_linear, (x, q, scale, given, "reference"))


def test_its_operations_are_those_of_the_layer(operands):
    with FlopCounterMode(display=False) as mode:
        weight_only_linear(*operands, implementation="reference")
    assert mode.get_total_flops() == 2 * 3 * 64 * 5


def test_operands_that_do_not_belong_together(operands):
    x, q, scale, bias = operands
    for wrong in (
        (x[0], q, scale, bias),
        (x[:, :32], q, scale, bias),
        (x, q.t().contiguous().t(), scale, bias),
        (x, q, scale[:4], bias),
        (x, q, scale, bias[:4]),
    ):
        with pytest.raises(ShapeError, match="a linear layer of"):
            weight_only_linear(*wrong, implementation="reference")
    for wrong, message in (
        ((x.double(), q, scale, bias), "x in torch.float64"),
        ((x, q.float(), scale, bias), "weights in torch.float32"),
        ((x, q, scale.half(), bias), "scales in torch.float16"),
    ):
        with pytest.raises(ConfigError, match=message):
            weight_only_linear(*wrong, implementation="reference")
    with pytest.raises(ConfigError, match="implementation 'cutlass' of weight_only"):
        weight_only_of("cutlass")


def test_a_cpu_has_the_library_s_product_for_int8_in_bf16(monkeypatch):
    monkeypatch.setattr(module, "_native_is_right", lambda: True)
    assert fastest(CPU, torch.bfloat16, "int8", 64) == "native"
    assert fastest(CPU, torch.bfloat16, "int8", 80) is None
    assert fastest(CPU, torch.float16, "int8", 64) is None
    assert fastest(CPU, torch.bfloat16, "fp8", 64) is None
    monkeypatch.setattr(module, "_native_is_right", lambda: False)
    assert fastest(CPU, torch.bfloat16, "int8", 64) is None


def test_a_library_that_is_wrong_is_not_used(monkeypatch):
    right = weight_only_of("reference")
    for run, expected in ((lambda *given: right(*given), True), (lambda *given: right(*given) * 1.1, False)):
        monkeypatch.setattr(module, "weight_only_of", lambda name, run=run: run if name == "native" else right)
        module._native_is_right.cache_clear()
        assert module._native_is_right() is expected
    module._native_is_right.cache_clear()


def test_a_trial_is_the_same_whatever_the_default_device_is():
    tried = module._native_is_right.__wrapped__
    expected = tried()
    with torch.device("meta"):
        assert tried() is expected
