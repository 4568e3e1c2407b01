"""Rates follow from size and time; sizes adapt to the format; a missing kernel is an answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek_mp.backends import capabilities
from deepseek_mp.costs import Timing
from deepseek_mp.workloads import rates
from deepseek_mp.workloads.rates import LARGEST, SMALLEST, matmul_rates

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, gflops: dict[torch.dtype, float]) -> list[tuple[torch.dtype, int]]:
    """Replace the clock: a product takes what its size takes at the given rate. Returns the products asked for."""
    asked: list[tuple[torch.dtype, int]] = []
    real_randn = torch.randn

    def randn(rows: int, columns: int, **kwargs: Any) -> torch.Tensor:
        asked.append((torch.float32, rows))
        return real_randn(2, 2)

    def time_call(fn: Any, device: torch.device, *, budget_s: float) -> Timing:
        dtype, size = fn().dtype, asked[-1][1]
        asked[-1] = (dtype, size)
        milliseconds = 2 * size**3 / (gflops[dtype] * 1e6)
        return Timing(median_ms=milliseconds * 3, low_ms=milliseconds, high_ms=milliseconds * 9, runs=3)

    monkeypatch.setattr(rates.torch, "randn", randn)
    monkeypatch.setattr(rates, "time_call", time_call)
    return asked


def test_a_rate_is_two_n_cubed_over_the_shortest_time_and_slow_formats_stay_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, {torch.float32: 50.0, torch.bfloat16: 4e6, torch.float16: 0.1})
    found = {rate.format: rate for rate in matmul_rates(CPU)}
    assert set(found) == {"fp32", "bf16", "fp16"}
    assert found["fp32"].gflops == pytest.approx(50.0)
    assert found["bf16"].gflops == pytest.approx(4e6)
    assert found["fp32"].size == 1024  # 512 would last 5 ms, too short to be timed well
    assert found["bf16"].size == LARGEST
    assert found["fp16"].size == SMALLEST


def test_a_real_measurement_gives_rates_and_says_what_is_native() -> None:
    found = {rate.format: rate for rate in matmul_rates(CPU, long_enough_ms=0.01, budget_s=0.0)}
    native = capabilities(CPU).matmul_formats
    for name in ("fp32", "bf16", "fp16"):
        assert found[name].native == (name in native)
        assert found[name].gflops is not None
        assert found[name].gflops > 0


def test_a_format_without_a_kernel_is_reported_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_call(fn: Any, device: torch.device, *, budget_s: float) -> Timing:
        if fn().dtype == torch.float16:
            raise RuntimeError('"addmm_impl_cpu_" not implemented for Half\nsecond line')
        return Timing(median_ms=1.0, low_ms=1.0, high_ms=1.0, runs=3)

    monkeypatch.setattr(rates, "time_call", time_call)
    found = {rate.format: rate for rate in matmul_rates(CPU, long_enough_ms=0.5)}
    assert found["fp16"].gflops is None
    assert found["fp16"].problem == '"addmm_impl_cpu_" not implemented for Half'
    assert found["fp32"].gflops == pytest.approx(2 * SMALLEST**3 / 1e6)
