"""The doctor's facts are those of the capability table and of PyTorch's settings right now."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from deepseek_mp.backends import capabilities
from deepseek_mp.errors import ConfigError
from deepseek_mp.workloads import doctor
from deepseek_mp.workloads.doctor import advice, all_devices, examine, formats_of, settings_of, warnings_of
from deepseek_mp.workloads.rates import Rate


def rate(format: str, gflops: float | None) -> Rate:
    return Rate(format=format, native=True, gflops=gflops, size=128, shortest_ms=1.0)


def test_the_facts_of_the_cpu_are_those_of_the_table_and_json() -> None:
    facts = json.loads(json.dumps(examine("cpu", measure=False)))
    device, expected = facts["devices"][0], capabilities("cpu")
    assert device["recommended"]["reason"] == expected.recommended.reason
    assert device["notes"] == list(expected.notes)
    assert device["rates"] == []
    assert facts["machine"]["torch"] == torch.__version__


def test_where_fp8_pays_is_a_fact_only_when_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "matmul_rates", lambda device: [])
    fp8 = examine("cpu")["devices"][0]["fp8"]
    assert (fp8["times"], fp8["pays_from"]) == ([], None)
    assert "does not multiply" in fp8["why"]
    monkeypatch.setattr(doctor, "fp8_pays", lambda device: pytest.fail("measured"))
    assert examine("cpu", measure=False)["devices"][0]["fp8"] is None


def test_every_format_is_native_emulated_or_absent() -> None:
    found = formats_of({"matmul_formats": ["fp32", "bf16"], "emulated_formats": ["fp16"]})
    assert (found["bf16"], found["fp16"], found["tf32"]) == ("native", "emulated", "absent")


def test_all_devices_end_with_the_cpu() -> None:
    assert all_devices()[-1] == torch.device("cpu")


def test_an_accelerators_other_devices_are_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert [str(device) for device in all_devices()] == ["cuda", "cuda:1", "cuda:2", "cpu"]


def test_a_hidden_setting_is_reported_as_found_and_warned_about() -> None:
    name = "torch.backends.mkldnn.matmul.fp32_precision"
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert warnings_of(settings_of(torch.device("cpu"))) == []
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        found = settings_of(torch.device("cpu"))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert found[name] == "bf16"
    assert warnings_of(found) == [f"{name} is 'bf16': products of fp32 tensors may be computed in bf16"]


def test_the_settings_of_cuda_can_be_read_without_one() -> None:
    found = settings_of(torch.device("cuda"))
    assert found["torch.backends.cudnn.benchmark"] is torch.backends.cudnn.benchmark
    assert "torch.backends.cuda.matmul.fp32_precision" in found


@pytest.mark.parametrize(
    ("rates", "recommended", "expected"),
    [
        ([rate("fp32", 50.0), rate("bf16", 150.0)], "bf16", "large products in bf16 run 3.0 times as fast as in fp32"),
        ([rate("fp32", 50.0), rate("bf16", None)], "bf16", ""),
        ([rate("fp32", 50.0)], "fp32", ""),
        ([], "bf16", ""),
    ],
)
def test_advice_compares_what_was_measured(rates: list[Any], recommended: str, expected: str) -> None:
    assert advice(rates, recommended) == expected


def test_a_device_this_machine_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not known to this PyTorch"):
        examine("bogus")
