"""Weights in 4 bits: how they are rounded, and the op that multiplies with them, in eager and in compiled code."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.ops import int4_linear as module
from deepseek_mp.ops.choose import int4_linear_of
from deepseek_mp.ops.int4_linear import (
    codes_by,
    fastest,
    grid_of,
    group_of,
    int4_linear,
    int4_weight,
    prepared,
    unprepared,
)
from deepseek_mp.ops.reference.int4_linear import unpacked, values_of, widened

CPU = torch.device("cpu")


@pytest.fixture
def operands():
    return torch.randn(3, 192), *int4_weight(torch.randn(16, 192)), torch.randn(16)


def test_groups_are_the_largest_that_divide_a_row():
    assert [group_of(width) for width in (4096, 192, 160, 32, 48, 0)] == [128, 64, 32, 32, None, None]


@pytest.mark.parametrize("width", [256, 192, 96])
def test_a_weight_is_the_nearest_of_its_group_s_values(width):
    weight = (torch.randn(6, width) + torch.rand(6, 1)) * torch.tensor([1.0, 1e-3, 1e4, 3.0, 1e-30, 1.0])[:, None]
    q, scale, zero = int4_weight(weight)
    group = group_of(width)
    assert (q.dtype, q.shape, scale.dtype, zero.dtype) == (torch.uint8, (6, width // 2), torch.bfloat16, torch.bfloat16)
    assert scale.shape == zero.shape == (width // group, 6)
    groups, found = (part.view(6, -1, group) for part in (weight, widened(q, scale, zero)))
    step = (groups.amax(2) - groups.amin(2)) / 15
    torch.testing.assert_close(scale.t().float(), step, rtol=2**-8, atol=0.0)
    # Half a step, and at the ends of the range what BF16 takes from scale and zero.
    slack = (step * 16 + groups.abs().amax(2)) * 2**-8
    assert bool(((found - groups).abs() <= (step / 2 + slack)[:, :, None] * 1.01).all())


def test_a_factor_multiplies_scales_and_leaves_zeros():
    weight, factor = torch.randn(6, 192), torch.rand(6, 3) + 0.5
    plain, (q, scale, zero) = int4_weight(weight), int4_weight(weight, factor=factor)
    assert torch.equal(zero, plain[2])
    assert torch.equal(scale, (plain[1].float() * factor.t()).to(torch.bfloat16))
    codes = ((weight.view(6, 3, 64) - zero.t().float()[..., None]) / scale.t().float()[..., None] + 8).round()
    assert torch.equal(unpacked(q, 3), codes.clamp(0, 15).to(torch.uint8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_group_that_is_not_finite_has_no_finite_value(bad):
    wide = torch.randn(2, 3, 32)
    wide[1, 2, 5] = bad
    scale, zero = grid_of(wide)
    finite = values_of(codes_by(wide, scale, zero), scale, zero).view(2, 3, 32).isfinite()
    assert not finite[1, 2].any()
    finite[1, 2] = True
    assert finite.all()


def test_codes_lie_in_halves_of_their_group():
    weight = torch.arange(16.0).repeat(4)[None]
    q, scale, zero = int4_weight(weight)
    assert (scale.item(), zero.item()) == (1.0, 8.0)
    assert q.tolist() == [[code * 17 for code in range(16)] * 2]
    assert unpacked(q, 1).tolist() == [[list(range(16)) * 4]]
    assert torch.equal(widened(q, scale, zero), weight)


def test_groups_of_one_value_have_it():
    weight = torch.zeros(2, 96)
    weight[1, 32:64] = 0.7
    weight[1, 64:] = torch.linspace(-1, 1, 32)
    found = widened(*int4_weight(weight))
    assert not found[0].any()
    assert found[1, 32:64].tolist() == [float(torch.tensor(0.7).to(torch.bfloat16))] * 32
    assert float((found[1, 64:] - weight[1, 64:]).abs().max()) < 0.08


def test_some_channels_of_a_larger_weight_are_a_layer():
    q, scale, zero = int4_weight(torch.randn(48, 128))
    x = torch.randn(3, 128)
    found = int4_linear(x, q[16:40], scale[:, 16:40], zero[:, 16:40], None, implementation="reference")
    torch.testing.assert_close(found, int4_linear(x, q, scale, zero, None, implementation="reference")[:, 16:40])


def test_scales_and_zeros_lie_in_lines_of_one_length():
    q, scale, zero = int4_weight(torch.randn(48, 256))
    with pytest.raises(ShapeError, match="a linear layer in 4 bits of"):
        int4_linear(
            torch.randn(3, 256), q[:24], scale[:, :24], zero[:, :24].contiguous(), None, implementation="reference"
        )


def test_weights_that_are_none():
    for bad in (torch.nan, -torch.inf):
        with pytest.raises(ConfigError, match="head with values that are not finite"):
            int4_weight(torch.full((1, 32), bad), "head")
    with pytest.raises(ConfigError, match="a weight with values beyond BF16"):
        int4_weight(torch.full((1, 32), 3.4e38))
    for wrong in (torch.ones(32), torch.ones(2, 48), torch.ones(2, 0)):
        with pytest.raises(ShapeError, match="for 4 bits"):
            int4_weight(wrong)


def test_it_is_the_linear_layer_of_the_rounded_weight(operands):
    x, q, scale, zero, bias = operands
    found = int4_linear(x, q, scale, zero, bias, implementation="reference")
    torch.testing.assert_close(found, F.linear(x, widened(q, scale, zero), bias))


def test_the_compiler_is_told_the_truth(operands):
    *given, bias = operands
    for added in (bias, None):
        torch.library.opcheck(torch.ops.deepseek_mp.int4_linear, (*given, added, "reference"))


def test_its_operations_are_those_of_the_layer(operands):
    with FlopCounterMode(display=False) as mode:
        int4_linear(*operands, implementation="reference")
    assert mode.get_total_flops() == 2 * 3 * 192 * 16


def test_operands_that_do_not_belong_together(operands):
    x, q, scale, zero, bias = operands
    for wrong in (
        (x[0], q, scale, zero, bias),
        (x[:, :64], q, scale, zero, bias),
        (x, q[:8], scale, zero, bias),
        (x, q, scale[:2], zero, bias),
        (x, q, scale.t().contiguous().t(), zero, bias),
        (x, q, scale, zero[:, :8], bias),
        (x, q, scale, zero, bias[:8]),
        (x, q, scale, None, bias),
    ):
        with pytest.raises(ShapeError, match="a linear layer in 4 bits of"):
            int4_linear(*wrong, implementation="reference")
    for wrong, message in (
        ((x.double(), q, scale, zero, bias), "x in torch.float64"),
        ((x, q, scale.half(), zero, bias), "scales in torch.float16"),
    ):
        with pytest.raises(ConfigError, match=message):
            int4_linear(*wrong, implementation="reference")
    with pytest.raises(ConfigError, match="prepared for another implementation than 'native'"):
        int4_linear(*operands, implementation="native")
    with pytest.raises(ConfigError, match="implementation 'cutlass' of int4_linear"):
        int4_linear_of("cutlass")


def test_the_kernels_come_before_the_library(monkeypatch):
    monkeypatch.setattr(module, "_native_is_right", lambda device, group: True)
    assert fastest(CPU, torch.bfloat16, 32, 96) == "native"
    assert fastest(CPU, torch.bfloat16, 40, 96) is None
    assert fastest(CPU, torch.bfloat16, 32, 48) is None
    assert fastest(CPU, torch.float16, 32, 96) is None
    assert fastest(CPU, torch.float32, 32, 96) is None
    assert fastest(torch.device("meta"), torch.bfloat16, 32, 96) is None
    monkeypatch.setattr(module, "_kernels_run", lambda device, dtype: True)
    assert fastest(CPU, torch.float16, 40, 96) == "triton"
    monkeypatch.setattr(module, "_kernels_run", lambda device, dtype: False)
    monkeypatch.setattr(module, "_native_is_right", lambda device, group: False)
    assert fastest(CPU, torch.bfloat16, 32, 96) is None


def test_a_library_that_is_wrong_is_not_used(monkeypatch):
    right = int4_linear_of("reference")

    def failing(*given):
        raise RuntimeError("no such product")

    monkeypatch.setattr(module, "prepared", lambda *kept, implementation: kept)
    for run, expected in ((right, True), (lambda *given: right(*given) * 1.1, False), (failing, False)):
        monkeypatch.setattr(module, "int4_linear_of", lambda name, run=run: run if name == "native" else right)
        module._native_is_right.cache_clear()
        assert module._native_is_right(CPU, 32) is expected
    module._native_is_right.cache_clear()


def test_only_the_library_has_an_order_of_its_own(operands):
    _, *kept, _ = operands
    for name in ("reference", "triton"):
        made = prepared(*kept, implementation=name)
        assert all(one is other for one, other in zip(made, kept, strict=True))
        assert all(one is other for one, other in zip(unprepared(*made), kept, strict=True))


def test_a_trial_is_the_same_whatever_the_default_device_is():
    tried = module._native_is_right.__wrapped__
    expected = tried(CPU, 128)
    with torch.device("meta"):
        assert tried(CPU, 128) is expected
