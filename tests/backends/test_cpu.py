"""CPUs: which 16-bit formats have units, what oneDNN makes of FP32, memory of the process."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_mp.backends import (
    available_memory_bytes,
    capabilities,
    fp32_mode,
    math_mode,
    peak_memory_bytes,
    peak_reserved_bytes,
    reset_peak_memory,
    synchronize,
)
from deepseek_mp.backends import cpu as cpu_module

Install = Callable[..., None]
CPU = torch.device("cpu")
B: Any = torch.backends


def test_fp16_without_units_is_not_native_though_autocast_would_run_it(processor: Install) -> None:
    processor("x86_64", "avx512_bf16", bf16=True, fp16=False)
    found = capabilities("cpu")
    assert found.admissible() == ("bf16", "fp32")
    assert found.require("fp16", emulate=True) is False


@pytest.mark.parametrize(
    ("sets", "onednn", "native"),
    [
        (("amx_bf16", "avx512_bf16", "amx_fp16"), (True, True), {"bf16", "fp16"}),
        (("amx_bf16", "avx512_bf16", "avx512_fp16"), (True, True), {"bf16", "fp16"}),
        (("amx_bf16", "avx512_bf16", "avx512_fp16"), (True, False), {"bf16"}),
        (("avx512_bf16",), (False, False), set()),
        (("avx512_f",), (True, False), set()),  # Skylake-X: oneDNN accepts BF16 there and emulates it
        (("avx2", "avx_ne_convert"), (True, True), set()),  # conversions only, no products
    ],
)
def test_a_16_bit_format_needs_instructions_and_a_library_that_uses_them(
    processor: Install, sets: tuple[str, ...], onednn: tuple[bool, bool], native: set[str]
) -> None:
    processor("x86_64", *sets, bf16=onednn[0], fp16=onednn[1])
    found = capabilities("cpu")
    assert found.matmul_formats & {"bf16", "fp16"} == native
    assert found.emulated_formats >= {"bf16", "fp16"} - native
    assert str(found.recommended) == ("BF16+FP32" if "bf16" in native else "FP32")


@pytest.mark.parametrize(("sets", "native"), [(("bf16", "i8mm"), True), (("neon",), False)])
def test_arm_has_bf16_where_its_flag_says_so(processor: Install, sets: tuple[str, ...], native: bool) -> None:
    processor("aarch64", *sets, bf16=True)
    found = capabilities("cpu")
    assert found.id == "aarch64"
    assert ("bf16" in found.admissible()) == native


def test_a_pytorch_without_onednn_has_no_16_bit_units(processor: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    processor("x86_64", "amx_bf16", "amx_fp16", bf16=True, fp16=True)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert capabilities("cpu").admissible() == ("fp32",)


@pytest.fixture
def bf16_flag() -> Iterator[None]:
    """oneDNN may compute FP32 matrix products in BF16, as a user would set it."""
    B.mkldnn.matmul.fp32_precision = "bf16"
    yield
    B.mkldnn.matmul.fp32_precision = "none"


def relative_error(size: int) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())


@pytest.mark.usefixtures("bf16_flag")
def test_what_is_said_of_fp32_is_what_runs() -> None:
    error, said = relative_error(512), fp32_mode("cpu", "matmul")
    assert said == ("bf16" if error > 1e-4 else "ieee")
    with math_mode("cpu", fp32="ieee", search=False):
        assert fp32_mode("cpu", "matmul") == "ieee"
        assert relative_error(512) < 1e-6


@pytest.mark.parametrize(
    ("sets", "said"),
    [(("x86_64", "amx_bf16"), "bf16"), (("x86_64", "avx512_bf16"), "ieee"), (("aarch64", "bf16"), "bf16")],
)
@pytest.mark.usefixtures("bf16_flag")
def test_onednns_bf16_flag_means_something_where_it_has_units_for_it(
    processor: Install, sets: tuple[str, ...], said: str
) -> None:
    processor(*sets, bf16=True)
    assert (fp32_mode("cpu", "matmul"), fp32_mode("cpu", "conv")) == (said, "ieee")


def test_the_machines_memory_is_more_than_this_process_holds() -> None:
    found = available_memory_bytes(CPU)
    assert found is None or found > (peak_memory_bytes(CPU) or 0)


def test_peak_memory_is_the_processs_and_can_be_reset() -> None:
    before = peak_memory_bytes(CPU)
    assert before is not None
    assert before > 50 << 20  # PyTorch alone is more than that
    if not reset_peak_memory(CPU):
        pytest.skip("the peak cannot be reset: no writable /proc/self/clear_refs")
    start = peak_memory_bytes(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    grown = peak_memory_bytes(CPU)
    del held
    reset_peak_memory(CPU)
    assert start is not None
    assert grown is not None
    assert 60 << 20 < grown - start < 80 << 20
    assert peak_memory_bytes(CPU) < grown - (32 << 20)  # type: ignore[operator]


def test_what_the_heap_took_is_not_counted() -> None:
    assert peak_reserved_bytes(CPU) is None


def test_peak_memory_without_linux_is_getrusages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_module, "STATUS", tmp_path / "absent")
    resource = pytest.importorskip("resource", reason="no getrusage on this system")
    wanted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(platform, "system", lambda: "Darwin")  # counts in bytes
    assert peak_memory_bytes(CPU) == wanted
    monkeypatch.setattr(platform, "system", lambda: "FreeBSD")  # counts in KiB
    assert peak_memory_bytes(CPU) == wanted * 1024
    assert reset_peak_memory(CPU) is False


def test_a_peak_that_may_not_be_reset_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_module, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    assert reset_peak_memory(CPU) is False


def test_waiting_for_a_cpu_returns() -> None:
    synchronize(CPU)
