"""Intel GPUs: products told by name, one stack or two, the old TF32 flag."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from deepseek_mp.backends import capabilities
from deepseek_mp.backends.xpu import XpuBackend

Install = Callable[..., None]
MAX_1550 = "Intel(R) Data Center GPU Max 1550"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (MAX_1550, "xpu_pvc"),
        ("Intel(R) Arc(TM) B580 Graphics", "xpu_bmg"),
        ("Intel(R) Arc(TM) Pro B50 Graphics", "xpu_bmg"),
        ("Intel(R) Arc(TM) A770 Graphics", "unknown"),
        ("Intel(R) Iris(R) Xe Graphics", "unknown"),
    ],
)
def test_products_are_told_by_name(intel_gpu: Install, name: str, row: str) -> None:
    intel_gpu(name)
    assert capabilities("xpu:0").id == row


def test_a_part_without_matrix_units_is_unknown_whatever_its_name(intel_gpu: Install) -> None:
    intel_gpu(MAX_1550, matrix_units=False)
    assert capabilities("xpu:0").id == "unknown"


def test_the_peak_is_that_of_one_stack(intel_gpu: Install) -> None:
    intel_gpu(MAX_1550)
    assert capabilities("xpu:0").peak_tflops == {"bf16": 340.8}
    intel_gpu(MAX_1550, units=1024)
    assert capabilities("xpu:1").peak_tflops == {}


def test_bf16_that_pytorch_calls_emulated_is_not_native(intel_gpu: Install) -> None:
    intel_gpu(MAX_1550, bf16=False)
    found = capabilities("xpu:0")
    assert "bf16" not in found.matmul_formats
    assert found.require("bf16", emulate=True) is False
    assert str(found.recommended) == "FP32"


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """oneDNN's flag as a PyTorch built for Intel GPUs has it."""
    flags = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.xpu, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.backends, "mkldnn", flags)
    return flags


@pytest.mark.parametrize(("mode", "tf32"), [("ieee", False), ("tf32", True)])
def test_tf32_is_set_and_restored(onednn: SimpleNamespace, mode: str, tf32: bool) -> None:
    with XpuBackend().fp32_math(mode):
        assert onednn.allow_tf32 == tf32
        assert XpuBackend().fp32_mode("matmul") == ("tf32" if tf32 else "ieee")
    assert onednn.allow_tf32 is True


def test_the_flag_is_left_alone_without_intel_gpus(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.xpu, "_is_compiled", lambda: False)
    with XpuBackend().fp32_math("ieee"):
        assert XpuBackend().fp32_mode("matmul") == "ieee"
    assert len(recwarn) == 0
