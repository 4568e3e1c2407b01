"""Ascend: the misleading name, saturation, HF32 defaults, and torch_npu that does not load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_mp.backends import Capabilities
from deepseek_mp.backends.ascend import AscendBackend, load

Npu = Callable[..., SimpleNamespace]
# PyTorch knows the device type "npu" only once torch_npu is loaded; `meta` stands for it.
DEVICE = torch.device("meta", 0)


def found(npu: Npu, number: int, name: str, **options: bool) -> Capabilities:
    npu(number, name, **options)
    return AscendBackend().capabilities(DEVICE)


def test_ascend910b_is_the_first_generation_and_910b1_is_not(npu: Npu) -> None:
    first = found(npu, 104, "Ascend910B", inf_nan=False, bf16=False)
    second = found(npu, 220, "Ascend910B1")
    assert (first.id, first.overflow) == ("ascend910_gen1", "saturate")
    assert (second.id, second.overflow) == ("ascend910b", "ieee")
    assert "bf16" not in first.matmul_formats | first.emulated_formats
    assert "bf16" in second.matmul_formats


@pytest.mark.parametrize(
    ("number", "row"),
    [
        (99, "unknown"), (100, "ascend910_gen1"), (104, "ascend910_gen1"), (105, "unknown"),
        (219, "unknown"), (220, "ascend910b"), (225, "ascend910b"), (226, "unknown"),
        (250, "ascend910c"), (256, "ascend910c"), (260, "ascend950"), (261, "unknown"),
    ],
)  # fmt: skip
def test_rows_are_ranges_of_soc_numbers(npu: Npu, number: int, row: str) -> None:
    assert found(npu, number, "Ascend").id == row


def test_a_driver_that_saturates_is_believed_over_the_table(npu: Npu) -> None:
    capabilities = found(npu, 223, "Ascend910B3", inf_nan=False)
    assert capabilities.overflow == "saturate"
    assert "INF/NaN mode is off, so overflow saturates" in capabilities.notes


def test_recommended_is_fp16_with_hf32_for_what_does_not_tolerate_it(npu: Npu) -> None:
    combination = found(npu, 223, "Ascend910B3").recommended
    assert (combination.compute, combination.fallback, combination.master) == ("fp16", "hf32", "fp32")
    assert combination.loss_scaling


def test_autocast_formats_are_the_devices_own_answer(npu: Npu) -> None:
    npu(104, "Ascend910B", inf_nan=False, bf16=False)
    assert AscendBackend().autocast_formats(DEVICE) == {"fp16"}
    npu(223, "Ascend910B3")
    assert AscendBackend().autocast_formats(DEVICE) == {"fp16", "bf16"}


@pytest.mark.parametrize(("mode", "hf32"), [("ieee", False), ("hf32", True)])
def test_hf32_is_set_for_both_kinds_of_product_and_restored(npu: Npu, mode: str, hf32: bool) -> None:
    device = npu(223, "Ascend910B3")
    backend = AscendBackend()
    assert (backend.fp32_mode("matmul"), backend.fp32_mode("conv")) == ("ieee", "hf32")  # torch_npu's defaults
    try:
        with backend.fp32_math(mode):
            assert (device.matmul.allow_hf32, device.conv.allow_hf32) == (hf32, hf32)
            raise KeyError
    except KeyError:
        pass
    assert (device.matmul.allow_hf32, device.conv.allow_hf32) == (False, True)


class FloatStatus:
    """The overflow flag of a saturating chip, read and cleared through torch_npu's two operations."""

    def __init__(self) -> None:
        self.overflowed = False

    def install(self) -> None:
        library: Any = sys.modules["torch_npu"]
        library.npu_clear_float_status = self.clear
        library.npu_get_float_status = self.read

    def clear(self, status: torch.Tensor) -> torch.Tensor:
        assert status.shape == (8,)
        self.overflowed = False
        return status

    def read(self, status: torch.Tensor) -> torch.Tensor:
        assert status.shape == (8,)
        return torch.tensor([float(self.overflowed), *[0.0] * 7])  # the answer is returned, the argument unchanged


def test_the_overflow_flag_is_read_where_overflow_saturates(npu: Npu) -> None:
    npu(104, "Ascend910B", inf_nan=False)
    status = FloatStatus()
    status.install()
    backend, device = AscendBackend(), torch.device("cpu")
    status.overflowed = True
    seen = backend.overflow_seen(device)
    assert seen is not None
    assert (seen.dtype, seen.shape, seen.item()) == (torch.bool, (), True)
    backend.clear_overflow(device)
    cleared = backend.overflow_seen(device)
    assert cleared is not None
    assert not cleared.item()


def test_the_overflow_flag_is_not_touched_where_overflow_gives_infinities(npu: Npu) -> None:
    npu(223, "Ascend910B3")
    backend = AscendBackend()
    backend.clear_overflow(DEVICE)  # the fake library has no such operation
    assert backend.overflow_seen(DEVICE) is None


def test_torch_npu_without_its_libraries_is_one_warning_and_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_npu.py").write_text("raise RuntimeError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    with pytest.warns(UserWarning, match=r"torch_npu is installed but cannot be used.*libhccl\.so") as caught:
        available = AscendBackend().is_available()
    assert not available
    assert not AscendBackend().is_available()  # remembered: no second import, no second warning
    assert len(caught) == 1
    assert AscendBackend().autocast_formats(DEVICE) == set()
    with AscendBackend().fp32_math("ieee"):
        assert AscendBackend().fp32_mode("conv") == "ieee"


def test_without_torch_npu_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load() is None
    assert not AscendBackend().is_available()
