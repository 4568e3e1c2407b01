"""NVIDIA: compute capabilities, the T4's emulated BF16, hidden TF32, NVML's energy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from deepseek_mp.backends import backend_for, capabilities, energy_joules, fp32_mode, math_mode, synchronize
from deepseek_mp.backends.cuda import CudaBackend
from deepseek_mp.backends.measure import (
    available_memory_bytes,
    peak_memory_bytes,
    peak_reserved_bytes,
    reset_peak_memory,
)

Install = Callable[..., None]


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((7, 2), "sm_70"),
        ((8, 7), "sm_86"),
        ((8, 8), "sm_86"),
        ((10, 1), "sm_103"),
        ((12, 1), "sm_120"),
    ],
)
def test_an_unlisted_minor_version_has_the_formats_of_its_family_and_no_peak(
    nvidia: Install, capability: tuple[int, int], row: str
) -> None:
    nvidia(*capability, "NVIDIA GeForce RTX 5090")
    found = capabilities("cuda:0")
    assert found.id == row
    assert not found.peak_tflops
    assert f"compute capability {capability[0]}.{capability[1]} has no row" in found.notes[-1]


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_emulated_bf16_is_not_native_although_pytorch_says_it_is_supported(
    nvidia: Install, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    nvidia(*capability)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    found = capabilities("cuda:0")
    assert "bf16" not in found.admissible()
    assert found.require("bf16", emulate=True) is False
    assert (str(found.recommended), found.recommended.loss_scaling) == ("FP16+FP32", True)


def test_cuda_belongs_to_nvidia_only_without_hip(nvidia: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia(9, 0)
    assert backend_for("cuda").name == "cuda"
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    assert backend_for("cuda").name == "rocm"
    assert not CudaBackend().serves(torch.device("cuda"))
    assert not CudaBackend().is_available()


def test_cudnns_hidden_tf32_is_reported_only_where_the_gpu_has_it(nvidia: Install) -> None:
    backends: Any = torch.backends
    assert backends.cudnn.conv.fp32_precision == "tf32"  # PyTorch's default
    nvidia(7, 5)
    assert fp32_mode("cuda:0", "conv") == "ieee"
    nvidia(8, 0)
    assert fp32_mode("cuda:1", "conv") == "tf32"
    assert fp32_mode("cuda:1", "matmul") == "ieee"
    with math_mode("cuda:1", fp32="tf32", search=False):
        assert fp32_mode("cuda:1", "matmul") == "tf32"


class FakeNvml(ModuleType):
    """NVML with one GPU that has used 1234.5 joules."""

    class NVMLError(Exception):
        pass

    def __init__(self, failing: str = "") -> None:
        super().__init__("pynvml")
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*args: object) -> Any:
            if name == self.failing:
                raise self.NVMLError(name)
            if name == "nvmlDeviceGetHandleByUUID":
                assert args == ("GPU-ab-12",)
                return "handle"
            return 1_234_500 if name == "nvmlDeviceGetTotalEnergyConsumption" else None

        return call


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize(("share", "expected"), [(1.0, 90), (0.5, 50)])
def test_what_a_process_may_hold_is_what_is_free_and_its_own_within_its_share(
    nvidia: Install, monkeypatch: pytest.MonkeyPatch, share: float, expected: int, device: str
) -> None:
    def share_of(asked: torch.device | int | None = None) -> float:
        if isinstance(asked, torch.device) and asked.index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{asked}")
        return share

    nvidia(9, 0, "NVIDIA H200")
    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cuda)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", share_of)
    assert available_memory_bytes(device) == expected


def test_energy_is_nvmls_counter_in_joules(nvidia: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia(9, 0, uuid="ab-12")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert energy_joules("cuda:0") == 1234.5


@pytest.mark.parametrize(
    "failing", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption", "absent"]
)
def test_energy_is_none_without_a_counter(nvidia: Install, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    nvidia(9, 0, uuid="ab-12")
    monkeypatch.setitem(sys.modules, "pynvml", None if failing == "absent" else FakeNvml(failing))
    assert energy_joules("cuda:0") is None


# ------------------------------------------------------------------------------ on a real GPU


@pytest.mark.gpu
def test_the_table_agrees_with_the_gpu_that_is_here() -> None:
    if torch.version.hip or not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    found = capabilities("cuda")
    assert ("bf16" in found.matmul_formats) == torch.cuda.is_bf16_supported(including_emulation=False)
    assert ("tf32" in found.matmul_formats) == torch.cuda.is_tf32_supported()
    assert found.device_name == torch.cuda.get_device_name()


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "worst"), [("ieee", 1e-5), ("tf32", 1e-2)])
def test_math_mode_decides_what_fp32_really_is(mode: Any, worst: float) -> None:
    if not torch.cuda.is_available() or "tf32" not in capabilities("cuda").matmul_formats:
        pytest.skip("no GPU with TF32 units")
    a, b = torch.randn(256, 256, device="cuda"), torch.randn(256, 256, device="cuda")
    image, kernel = torch.randn(2, 64, 16, 16, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    exact = a.double() @ b.double()
    exact_conv = torch.nn.functional.conv2d(image.double(), kernel.double())
    with math_mode("cuda", fp32=mode, search=False):
        product, conv = a @ b, torch.nn.functional.conv2d(image, kernel)
    for got, wanted in ((product, exact), (conv, exact_conv)):
        error = ((got - wanted).norm() / wanted.norm()).item()
        assert worst / 1000 < error < worst


@pytest.mark.gpu
def test_energy_grows_with_work() -> None:
    if energy_joules("cuda") is None:
        pytest.skip("no energy counter: needs an NVIDIA GPU and the package nvidia-ml-py")
    before = energy_joules("cuda")
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        a = torch.nn.functional.normalize(a @ a)
    synchronize("cuda")
    after = energy_joules("cuda")
    assert before is not None
    assert after is not None
    assert after > before


@pytest.mark.gpu
def test_peak_memory_counts_from_the_reset() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    large = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    del large
    assert reset_peak_memory("cuda")
    before = peak_memory_bytes("cuda")
    held = torch.empty(16 << 20, dtype=torch.uint8, device="cuda")
    after = peak_memory_bytes("cuda")
    assert before is not None
    assert after is not None
    assert held.numel() <= after - before < held.numel() + (2 << 20)
    reserved = peak_reserved_bytes("cuda")
    assert reserved is not None
    assert reserved >= after
