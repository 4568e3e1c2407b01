"""The peak is that of the tensors alive at the worst moment, exactly, whatever was freed before or after."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import torch
from torch.autograd.profiler import record_function

from deepseek_mp.costs.memory import distinct_bytes, optimizer_tensors, peak_during
from deepseek_mp.optim import AdamW

CPU = torch.device("cpu")
MIB = 2**20


def megabytes(count: float) -> torch.Tensor:
    return torch.zeros(int(count * MIB), dtype=torch.uint8)


def test_what_was_freed_before_the_worst_moment_does_not_count() -> None:
    def call() -> None:
        first = megabytes(3)
        del first
        second, third = megabytes(2), megabytes(2)
        del second, third

    assert peak_during(call, CPU, resident=[]) == 4 * MIB


def test_what_python_frees_inside_of_a_larger_event_is_free_at_once() -> None:
    def call() -> None:
        with record_function("a step"):
            for _ in range(5):
                freed = megabytes(3)
                del freed

    assert peak_during(call, CPU, resident=[]) == 3 * MIB


def test_moments_in_8_bits_take_less_than_in_fp32() -> None:
    def peak(states: str) -> int:
        weight = torch.nn.Parameter(torch.randn(1024, 1024))
        weight.grad = torch.randn(1024, 1024)
        optimizer = AdamW([weight], states=states)
        optimizer.step()
        found = peak_during(optimizer.step, CPU, resident=[weight, weight.grad, *optimizer_tensors(optimizer)])
        assert found is not None
        return found

    assert peak("fp32") == pytest.approx(20 * MIB, rel=0.01)
    assert 10 * MIB < peak("8bit") < 17 * MIB


def test_tensors_that_were_there_before_count_once_per_storage() -> None:
    held = megabytes(5)
    assert peak_during(lambda: megabytes(1), CPU, resident=[held, held[:10]]) == 6 * MIB


def test_what_backward_needs_counts() -> None:
    weight = torch.zeros(256, 1024, requires_grad=True)  # 1 MiB

    def call() -> None:
        (weight * 2.0).exp().sum().backward()
        weight.grad = None

    # exp keeps its output for backward; the gradients of both operations are on top of it.
    peak = peak_during(call, CPU, resident=[])
    assert peak is not None
    assert 2 * MIB < peak < 5 * MIB


def test_an_exception_passes_and_standard_error_is_back(capfd: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        peak_during(call, CPU, resident=[])
    os.write(2, b"after")
    assert "after" in capfd.readouterr().err


def test_the_profilers_own_announcements_do_not_show(capfd: pytest.CaptureFixture[str]) -> None:
    peak_during(lambda: megabytes(1), CPU, resident=[])
    sys.stderr.flush()
    assert capfd.readouterr().err == ""


def test_the_tensors_of_an_optimizer_are_its_momenta_and_counts() -> None:
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.AdamW([weight], fused=True)
    assert optimizer_tensors(optimizer) == []
    weight.grad = torch.ones(8)
    optimizer.step()
    assert distinct_bytes(optimizer_tensors(optimizer)) == 4 * (8 + 8 + 1)


def test_of_several_threads_one_measures_at_a_time() -> None:
    """The profiler is one for the process."""
    inside, most = 0, 0

    def call() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1

    threads = [threading.Thread(target=peak_during, args=(call, CPU), kwargs={"resident": []}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
