"""The description of the machine names what a reader needs to compare two results."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

from deepseek_mp.version import __version__
from deepseek_mp.workloads.machine import cpu_name, describe_machine, usable_cores


def test_versions_and_device_are_those_of_this_process() -> None:
    found = describe_machine(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["deepseek_mp"] == __version__
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] == usable_cores() >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot bind a process to cores")
def test_only_cores_this_process_may_use_are_counted() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_cpus_name_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    text = "processor\t: 0\nmodel name\t: Fast Chip 9000\nmodel name\t: other\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **kwargs: text)
    assert cpu_name() == "Fast Chip 9000"


def test_a_system_that_lists_no_name_still_gives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert cpu_name() == "riscv64"
