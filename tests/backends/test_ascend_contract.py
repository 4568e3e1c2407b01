"""The published torch_npu wheel still answers as `backends/ascend.py` expects.

Runs where torch_npu can be imported and shows a device: on Ascend hardware, or with the wheel over
a stub of CANN's libraries, which is enough for everything here.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from deepseek_mp.backends import (
    autocast,
    capabilities,
    clear_overflow,
    default_device,
    fp32_mode,
    math_mode,
    overflow_seen,
    peak_memory_bytes,
    reset_peak_memory,
    synchronize,
)
from deepseek_mp.backends.ascend import AscendBackend, load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None or not AscendBackend().is_available(),
    reason="no torch_npu with a device: its wheel and CANN, or a stub of CANN, are not installed here",
)


def library() -> Any:
    return load()


def test_the_device_is_found_and_its_row_agrees_with_the_drivers_answers() -> None:
    npu: Any = torch.get_device_module("npu")
    found = capabilities("npu")
    assert default_device() == torch.device("npu")
    assert found.id != "unknown"
    assert found.device_name == npu.get_device_name(0)
    assert ("bf16" in found.matmul_formats) == npu.is_bf16_supported()
    assert (found.overflow == "saturate") == (not library().npu.utils.is_support_inf_nan())


def test_the_operations_of_the_overflow_flag_have_the_signature_they_had() -> None:
    for name in ("npu_get_float_status", "npu_clear_float_status"):
        schema = str(getattr(torch.ops.npu, name).default._schema)
        assert schema == f"npu::{name}(Tensor input, int mode=0) -> Tensor"


def test_the_overflow_flag_is_read_exactly_where_overflow_saturates() -> None:
    clear_overflow("npu")
    seen = overflow_seen("npu")
    assert (seen is None) == (capabilities("npu").overflow == "ieee")


def test_hf32_is_on_for_convolutions_by_default_and_math_mode_restores_it() -> None:
    npu: Any = torch.get_device_module("npu")
    assert (npu.matmul.allow_hf32, npu.conv.allow_hf32) == (False, True)
    with math_mode("npu", fp32="ieee", search=False):
        assert (npu.matmul.allow_hf32, npu.conv.allow_hf32) == (False, False)
        assert fp32_mode("npu", "conv") == "ieee"
    assert (npu.matmul.allow_hf32, npu.conv.allow_hf32) == (False, True)


def test_autocast_runs_what_it_says() -> None:
    for format, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if format in capabilities("npu").matmul_formats:
            with autocast("npu", format):
                assert torch.is_autocast_enabled("npu")
                assert torch.get_autocast_dtype("npu") is dtype


def test_memory_and_waiting_have_their_portable_names() -> None:
    synchronize("npu")
    assert reset_peak_memory("npu")
    assert isinstance(peak_memory_bytes("npu"), int)
