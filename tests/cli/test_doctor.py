"""`doctor` prints the facts it was given, and they are those of this machine."""

from __future__ import annotations

import json

import pytest
import torch

from deepseek_mp.backends import capabilities
from deepseek_mp.cli import doctor as doctor_command
from deepseek_mp.cli.app import main
from deepseek_mp.version import __version__
from deepseek_mp.workloads import doctor as facts_module
from deepseek_mp.workloads.fp8_pays import Fp8Pays, WidthTimes
from deepseek_mp.workloads.rates import Rate

RATES = [
    Rate(format="fp32", native=True, gflops=51234.56, size=1024, shortest_ms=1.0),
    Rate(format="bf16", native=True, gflops=102469.12, size=2048, shortest_ms=1.0),
    Rate(format="fp16", native=False, gflops=None, size=128, shortest_ms=None, problem="no kernel [half]"),
]


def test_the_text_has_the_facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(facts_module, "matmul_rates", lambda device: RATES)
    assert main(["doctor", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    cpu = capabilities("cpu")
    shown = [
        __version__, torch.__version__, cpu.device_name, cpu.id, str(cpu.recommended), cpu.recommended.reason,
        "51,234.6", "102,469.1", "no kernel [half]", "torch.backends.mkldnn.matmul.fp32_precision", *cpu.notes,
    ]  # fmt: skip
    assert [fact for fact in shown if fact not in out] == []
    for name in cpu.matmul_formats | cpu.emulated_formats:
        assert name in out


def test_json_has_the_same_facts_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts_module, "matmul_rates", lambda device: RATES)
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    device = json.loads(out)["devices"][0]
    assert device["matmul_formats"] == capabilities("cpu").to_json()["matmul_formats"]
    assert [rate["gflops"] for rate in device["rates"]] == [51234.56, 102469.12, None]


def test_nothing_is_measured_when_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(device: torch.device) -> list[Rate]:
        raise AssertionError("measured")

    monkeypatch.setattr(facts_module, "matmul_rates", refuse)
    assert main(["doctor", "--no-measure", "--device", "cpu"]) == 0
    assert "GFLOP/s" not in capsys.readouterr().out


def test_it_says_where_fp8_pays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = Fp8Pays(recipe="block", rows=8192, times=(WidthTimes(width=1024, bf16_ms=1.5, fp8_ms=1.25),))
    monkeypatch.setattr(facts_module, "matmul_rates", lambda device: [])
    monkeypatch.setattr(facts_module, "fp8_pays", lambda device: found)
    assert main(["doctor", "--device", "cpu"]) == 0
    assert f"  - {found.summary}" in capsys.readouterr().out.splitlines()
    assert "1.25 against 1.5 ms at width 1024" in found.summary
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    fp8 = json.loads(capsys.readouterr().out)["devices"][0]["fp8"]
    assert (fp8["pays_from"], fp8["times"]) == (1024, [{"width": 1024, "bf16_ms": 1.5, "fp8_ms": 1.25}])
    monkeypatch.setattr(facts_module, "fp8_pays", lambda device: Fp8Pays(recipe="", rows=8192, times=(), why="none"))
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "  - FP8: none" in capsys.readouterr().out


@pytest.mark.parametrize(("peaks", "shown"), [({"bf16": 204.93824}, "50 %"), ({}, "unknown")])
def test_a_rate_is_compared_with_the_peak_only_where_it_is_known(
    peaks: dict[str, float], shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts_module, "matmul_rates", lambda device: RATES)
    facts = facts_module.examine("cpu")
    facts["devices"][0]["peak_tflops"] = peaks
    monkeypatch.setattr(doctor_command, "examine", lambda *args, **kwargs: facts)
    assert main(["doctor"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "102,469.1" in line)
    assert shown in row
