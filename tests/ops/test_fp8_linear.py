"""Linear layers in FP8: what a row loses, what is not finite, and the op in eager and in compiled code."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.ops import fp8_linear as module
from deepseek_mp.ops.fp8_linear import fastest, fp8_linear, rounded_rows
from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.reference.quantise import quantise
from deepseek_mp.ops.weight_only import quantised_weight

CPU = torch.device("cpu")


@pytest.fixture
def operands():
    q, scale = quantised_weight(torch.randn(32, 64), "fp8")
    return torch.randn(3, 64), q, scale, torch.randn(32)


def test_it_is_the_linear_layer_with_both_rounded(operands):
    x, q, scale, bias = operands
    x = x * torch.tensor([1.0, 1e-20, 1e20])[:, None]
    found = fp8_linear(x, q, scale, None, implementation="reference")
    exact = F.linear(x, q.float() * scale[:, None])
    error = (found - exact).double().norm(dim=1) / exact.double().norm(dim=1)
    assert bool((error < 2**-4).all())  # each row has a scale of its own
    assert bool((error > 2**-9).all())  # and is rounded
    values = torch.tensor([[448.0, -3.5, 0.015625, 20.0]]).repeat(2, 16) * torch.tensor([[1.0], [4.0]])
    exactly = fp8_linear(values, q, scale, bias, implementation="reference")
    torch.testing.assert_close(exactly, F.linear(values, q.float() * scale[:, None], bias), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_rows_are_what_the_reference_multiplies(dtype):
    x = (torch.randn(6, 64) * torch.tensor([1.0, 1e-6, 0, 1e4, 3e-7, 1])[:, None]).to(dtype)
    x[5, 5] = torch.nan
    cast = Cast("fp8_e4m3", "row", power_of_two=False, rows=True, columns=False)
    values, scale, _, _ = quantise(x, cast)
    found = rounded_rows(x)
    assert found.dtype == torch.float32
    assert torch.equal(found[:5], dequantise(values, scale, "row")[:5])
    assert found[5].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_its_row(operands, bad):
    x, q, scale, bias = operands
    x[1, 5] = bad
    found = fp8_linear(x, q, scale, bias, implementation="reference")
    assert found.isfinite().all(1).tolist() == [True, False, True]
    assert not found[1].isfinite().any()


def test_the_compiler_is_told_the_truth(operands):
    x, q, scale, bias = operands
    sound = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema adds up FP8
    for given in (bias, None):
        op = torch.ops.deepseek_mp.fp8_linear
        torch.library.opcheck(op, (x, q, scale, given, "reference"), test_utils=sound)


def test_its_operations_are_those_of_the_layer(operands):
    with FlopCounterMode(display=False) as mode:
        fp8_linear(*operands, implementation="reference")
    assert mode.get_total_flops() == 2 * 3 * 64 * 32


def test_operands_that_do_not_belong_together(operands):
    x, q, scale, bias = operands
    for wrong in (
        (x[0], q, scale, bias),
        (x[:, :32], q, scale, bias),
        (x[:, :40], q[:, :40].contiguous(), scale, bias),
        (x, q[:31], scale[:31], bias[:31]),
        (x, q.t().contiguous().t(), scale, bias),
        (x, q, scale[:16], bias),
        (x, q, scale, bias[:16]),
    ):
        with pytest.raises(ShapeError, match="an FP8 linear layer of"):
            fp8_linear(*wrong, implementation="reference")
    for wrong, message in (
        ((x.double(), q, scale, bias), "x in torch.float64"),
        ((x, q.to(torch.float8_e5m2), scale, bias), "a weight in torch.float8_e5m2"),
        ((x, q, scale.half(), bias), "scales in torch.float16"),
    ):
        with pytest.raises(ConfigError, match=message):
            fp8_linear(*wrong, implementation="reference")


def test_only_devices_that_multiply_fp8_by_row_have_it(monkeypatch):
    assert fastest(CPU, torch.bfloat16, 64, 64) is None
    monkeypatch.setattr(module, "FORMAT", "fp32")  # which a CPU has
    monkeypatch.setattr(module, "why_not", lambda name, pairs, device: None)
    monkeypatch.setattr(module, "_native_is_right", lambda device, dtype: True)
    assert fastest(CPU, torch.bfloat16, 64, 64) == "native"
    assert fastest(CPU, torch.bfloat16, 64, 72) is None
    assert fastest(CPU, torch.bfloat16, 72, 64) is None
    assert fastest(CPU, torch.float32, 64, 64) is None
    monkeypatch.setattr(module, "why_not", lambda name, pairs, device: "it has not")
    assert fastest(CPU, torch.bfloat16, 64, 64) is None


def test_a_library_that_is_wrong_is_not_used(monkeypatch):
    right = module.fp8_linear_of("reference")

    def failing(*given):
        raise RuntimeError("no such product")

    for run, expected in ((right, True), (lambda *given: right(*given) * 1.1, False), (failing, False)):
        monkeypatch.setattr(module, "fp8_linear_of", lambda name, run=run: run if name == "native" else right)
        monkeypatch.setattr(module, "plain", right)
        module._native_is_right.cache_clear()
        assert module._native_is_right(CPU, torch.bfloat16) is expected
    module._native_is_right.cache_clear()


def test_a_trial_is_the_same_whatever_the_default_device_is():
    tried = module._native_is_right.__wrapped__
    expected = tried(CPU, torch.bfloat16)
    with torch.device("meta"):
        assert tried(CPU, torch.bfloat16) is expected
