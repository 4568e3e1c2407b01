"""Conversions against the set of values that each format can hold, with every loss counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek_mp.errors import FormatError
from deepseek_mp.ops import cast as cast_module
from deepseek_mp.ops.cast import CASTABLE, FP8, cast, read_fp8
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.precision import FORMATS, Format

NARROW = ("bf16", "fp16", *FP8)
ROUNDED = ("tf32", "hf32")
Array = np.ndarray[Any, np.dtype[np.float64]]
Where = np.ndarray[Any, np.dtype[np.bool_]]


def held_values(format: str) -> Array:
    """All finite values of a format from zero up, and one step more: what rounds to that overflows.

    The position of a value in the list is its bit pattern, so even positions have even mantissas.
    """
    dtype = torch_dtype(format)
    bits = torch.finfo(dtype).bits
    codes = torch.arange(2 ** (bits - 1), dtype=torch.int32)
    raw = codes.to(torch.uint8) if bits == 8 else codes.to(torch.int16)
    values = raw.view(dtype).double().numpy()
    finite: Array = values[np.isfinite(values)]
    return np.append(finite, 2 * finite[-1] - finite[-2])


def round_to(inputs: Array, format: str, *, flush: bool) -> tuple[Array, Where, Where]:
    """Nearest held value with ties to even, and where it overflowed and underflowed: the plain way."""
    held = held_values(format)
    size = np.abs(np.nan_to_num(inputs, nan=0.0, posinf=held[-1] * 4, neginf=held[-1] * 4))
    upper = np.clip(np.searchsorted(held, size), 1, len(held) - 1)
    below, above = size - held[upper - 1], held[upper] - size
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    position = np.where(take_upper, upper, upper - 1)
    rounded = held[position]
    if flush:
        rounded = np.where(rounded < FORMATS[format].smallest_normal, 0.0, rounded)
    finite = np.isfinite(inputs)
    overflowed = ~finite | (position == len(held) - 1)
    underflowed = finite & (inputs != 0) & (rounded == 0)
    return np.copysign(rounded, inputs), overflowed, underflowed


def trying(format: str) -> Tensor:
    """fp32 inputs that try a format: its values, the ties between them, their neighbours, and strangers."""
    held = held_values(format)
    held = held if len(held) < 300 else held[np.r_[0:200, np.arange(200, len(held) - 200, 37), -200:0]]
    ties = (held[1:] + held[:-1]) / 2
    points = torch.tensor(np.concatenate([held, ties]), dtype=torch.float32)
    near = [points, torch.nextafter(points, torch.tensor(torch.inf)), torch.nextafter(points, torch.tensor(0.0))]
    spread = torch.exp2(torch.linspace(-149, 127.9, 500))
    some = torch.cat([*near, spread, torch.randn(500)])
    return torch.cat([some, -some, torch.tensor([torch.inf, -torch.inf, torch.nan])])


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("format", NARROW)
def test_every_value_is_the_nearest_held_one_and_every_loss_is_counted(
    format: str, saturate: bool, flush: bool
) -> None:
    inputs = trying(format)
    result = cast(inputs, format, saturate=saturate, flush_subnormals=flush)
    rounded, overflowed, underflowed = round_to(inputs.double().numpy(), format, flush=flush)
    assert result.tensor.dtype is torch_dtype(format)
    assert result.overflowed.item() == overflowed.sum()
    assert result.underflowed.item() == underflowed.sum()
    got = result.tensor.double().numpy()
    np.testing.assert_array_equal(got[~overflowed], rounded[~overflowed])
    beyond = overflowed & ~np.isnan(inputs.numpy())
    largest = FORMATS[format].max if saturate else np.inf if FORMATS[format].has_inf else np.nan
    np.testing.assert_array_equal(np.abs(got[beyond]), np.full(beyond.sum(), largest))
    if not np.isnan(largest):
        np.testing.assert_array_equal(np.signbit(got[beyond]), np.signbit(inputs.numpy()[beyond]))
    assert np.isnan(got[np.isnan(inputs.numpy())]).all()


@pytest.mark.parametrize("format", [name for name in NARROW if not name.endswith("fnuz")])
def test_the_sign_of_zero_is_kept(format: str) -> None:
    result = cast(torch.tensor([0.0, -0.0, -1e-30 if format != "bf16" else -1e-45]), format, flush_subnormals=True)
    assert torch.signbit(result.tensor.float()).tolist() == [False, True, True]
    assert result.tensor.float().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("format", ROUNDED)
def test_tf32_and_hf32_are_fp32_values_with_a_shorter_mantissa(format: str) -> None:
    kept = FORMATS[format].mantissa_bits
    inputs = torch.cat(
        [torch.randn(2000) * torch.exp2(torch.randint(-100, 100, (2000,)).float()), 1 + torch.arange(64) * 2.0**-14]
    )
    result = cast(inputs, format)
    assert result.tensor.dtype is torch.float32
    wide = inputs.double().numpy()
    step = 2.0 ** (np.floor(np.log2(np.abs(wide))) - kept)
    np.testing.assert_array_equal(result.tensor.double().numpy(), np.rint(wide / step) * step)  # rint: ties to even
    assert not (result.tensor.view(torch.int32) & ((1 << (23 - kept)) - 1)).any()
    assert (result.overflowed.item(), result.underflowed.item()) == (0, 0)


@pytest.mark.parametrize("format", ROUNDED)
def test_the_edges_of_tf32_and_hf32(format: str) -> None:
    found = FORMATS[format]
    largest = torch.finfo(torch.float32).max
    inputs = torch.tensor(
        [found.max, largest, -largest, torch.inf, torch.nan, 2.0**-149, found.smallest_subnormal, 0.0]
    )
    result = cast(inputs, format)
    wanted = torch.tensor([found.max, torch.inf, -torch.inf, torch.inf, torch.nan, 0.0, found.smallest_subnormal, 0.0])
    torch.testing.assert_close(result.tensor, wanted, rtol=0, atol=0, equal_nan=True)
    assert (result.overflowed.item(), result.underflowed.item()) == (4, 1)
    assert cast(inputs, format, saturate=True).tensor[:4].tolist() == [found.max, found.max, -found.max, found.max]


def test_the_casts_own_overflow_is_never_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch to 2.11 makes NaN of what is out of range and later ones saturate, so neither may happen."""
    given: list[Tensor] = []
    real = cast_module._rounded

    def watched(values: Tensor, target: Format) -> Tensor:
        given.append(values)
        return real(values, target)

    monkeypatch.setattr(cast_module, "_rounded", watched)
    for saturate in (False, True):
        cast(trying("fp8_e4m3"), "fp8_e4m3", saturate=saturate)
    assert len(given) == 2
    assert all(values[~values.isnan()].abs().max() <= 464 for values in given)  # the last that rounds to 448


@pytest.mark.parametrize("source", ["fp64", "bf16", "fp16", *FP8])
@pytest.mark.parametrize("format", CASTABLE)
def test_every_format_converts_to_every_other(source: str, format: str) -> None:
    values = torch.tensor([0.0, 1.0, -1.5, 0.25, 224.0, torch.nan]).to(torch_dtype(source))
    result = cast(values, format)
    torch.testing.assert_close(result.tensor.double(), values.double(), rtol=0, atol=0, equal_nan=True)
    assert (result.overflowed.item(), result.underflowed.item()) == (1, 0)


def test_fp64_loses_what_fp32_cannot_hold() -> None:
    values = torch.tensor([1e300, -1e300, 1e-300, 1e-46, 3.0], dtype=torch.float64)
    for format in ("fp32", "bf16", "tf32"):
        result = cast(values, format)
        assert (result.overflowed.item(), result.underflowed.item()) == (2, 2)
        assert result.tensor.tolist() == [torch.inf, -torch.inf, 0.0, 0.0, 3.0]
    same = cast(values, "fp64")
    assert torch.equal(same.tensor, values)
    assert (same.overflowed.item(), same.underflowed.item()) == (0, 0)


def test_a_device_that_flushes_loses_what_others_keep() -> None:
    gradient = torch.tensor([2.0**-24, 2.0**-15, 2.0**-14, 1.0])
    kept, flushed = cast(gradient, "fp16"), cast(gradient, "fp16", flush_subnormals=True)
    assert (kept.underflowed.item(), flushed.underflowed.item()) == (0, 2)
    assert torch.equal(kept.tensor.float(), gradient)
    assert flushed.tensor.tolist() == [0.0, 0.0, 2.0**-14, 1.0]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    result = cast(torch.full(shape, 1e6), "fp16")
    assert result.tensor.shape == shape
    assert result.overflowed.item() == result.tensor.numel()
    assert (result.overflowed.shape, result.overflowed.dtype) == ((), torch.int64)


def test_the_input_and_its_memory_layout_are_left_alone() -> None:
    inputs = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    copy = inputs.clone()
    result = cast(inputs, "fp8_e4m3")
    assert torch.equal(inputs, copy)
    assert result.tensor.is_contiguous(memory_format=torch.channels_last)


def test_gradients_do_not_flow_through() -> None:
    assert not cast(torch.ones(3, requires_grad=True), "bf16").tensor.requires_grad


@pytest.mark.parametrize("format", CASTABLE)
def test_nothing_waits_for_the_device(format: str) -> None:
    """A meta tensor has no values to wait for."""
    result = cast(torch.empty(4, device="meta"), format, saturate=True, flush_subnormals=True)
    assert result.overflowed.device.type == result.underflowed.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("format", CASTABLE)
def test_the_gpu_gives_what_the_cpu_gives_without_waiting(format: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs = trying(format if format in NARROW else "bf16")
    there = inputs.cuda()
    for saturate in (False, True):
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = cast(there, format, saturate=saturate)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wanted = cast(inputs, format, saturate=saturate)
        torch.testing.assert_close(result.tensor.cpu().double(), wanted.tensor.double(), rtol=0, atol=0, equal_nan=True)
        assert (result.overflowed.item(), result.underflowed.item()) == (
            wanted.overflowed.item(),
            wanted.underflowed.item(),
        )


# -------------------------------------------------------------------------------- stored fp8


@pytest.mark.parametrize(("stored", "other"), [("fp8_e4m3", "fp8_e4m3fnuz"), ("fp8_e5m2", "fp8_e5m2fnuz")])
def test_stored_bytes_are_converted_by_value_and_not_reinterpreted(stored: str, other: str) -> None:
    values = torch.tensor([1.0, 240.0 if stored == "fp8_e4m3" else 1024.0, -0.5])
    raw = values.to(torch_dtype(stored)).view(torch.uint8)
    assert torch.equal(raw.view(torch_dtype(other)).float(), values / 2)  # what reinterpreting would give
    assert torch.equal(read_fp8(raw, stored, other).tensor.float(), values)
    back = read_fp8(read_fp8(raw, stored, other).tensor.view(torch.uint8), other, stored).tensor
    assert torch.equal(back.view(torch.uint8), raw)


def test_minus_zero_of_one_kind_is_not_nan_in_the_other() -> None:
    raw = torch.tensor([0x80], dtype=torch.uint8)
    assert raw.view(torch.float8_e4m3fnuz).float().isnan().all()
    result = read_fp8(raw, "fp8_e4m3", "fp8_e4m3fnuz")
    assert result.tensor.float().tolist() == [0.0]
    assert result.overflowed.item() == 0


def test_what_the_narrower_kind_cannot_hold_is_counted() -> None:
    raw = torch.tensor([448.0, 256.0, 240.0]).to(torch.float8_e4m3fn).view(torch.uint8)
    result = read_fp8(raw, "fp8_e4m3", "fp8_e4m3fnuz", saturate=True)
    assert result.overflowed.item() == 2
    assert result.tensor.float().tolist() == [240.0, 240.0, 240.0]


@pytest.mark.parametrize(("raw", "stored"), [(torch.zeros(2), "fp8_e4m3"), (torch.zeros(2, dtype=torch.uint8), "fp16")])
def test_bytes_need_the_format_they_were_stored_in(raw: Tensor, stored: str) -> None:
    with pytest.raises(FormatError, match=r"bytes of torch\.\w+ said to be .*Name the format they have"):
        read_fp8(raw, stored, "bf16")


# ----------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("format", ["int8", "e8m0", "int4", "fp4_e2m1"])
def test_a_format_that_needs_a_scale_is_refused(format: str) -> None:
    with pytest.raises(FormatError, match=f"{format} cannot be reached by rounding alone"):
        cast(torch.ones(2), format)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64])
def test_a_tensor_that_is_not_floating_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match=f"a tensor of {dtype} to convert to bf16"):
        cast(torch.ones(2, dtype=dtype), "bf16")
