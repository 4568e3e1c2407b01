"""Machines that are not here: each fixture makes PyTorch answer as it would with that device."""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_mp.backends import ascend, cuda, detect

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    memories = (detect.remembered, detect.plugins, ascend.load, cuda._energy_counter)
    for memory in memories:
        memory.cache_clear()
    yield
    for memory in memories:
        memory.cache_clear()


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A machine with one NVIDIA GPU of that compute capability and name."""

    def install(major: int, minor: int, name: str = "a GPU", **properties: Any) -> None:
        found = SimpleNamespace(major=major, minor=minor, name=name, **properties)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)

    return install


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch, nvidia: Install) -> Install:
    """A machine with one AMD GPU, whose compute capability is the number in its architecture's name."""

    def install(architecture: str, name: str = "AMD GPU", rocm: str = "7.1.52802") -> None:
        digits = architecture.split(":")[0].removeprefix("gfx")
        nvidia(int(digits[:-2]), int(digits[-2], 16), name, gcnArchName=architecture)
        monkeypatch.setattr(torch.version, "hip", rocm)

    return install


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """A machine with torch_npu and one Ascend device of that SoC number; gives back what `torch.npu` is."""

    def install(number: int, name: str, *, inf_nan: bool = True, bf16: bool = True) -> SimpleNamespace:
        device = SimpleNamespace(
            is_available=lambda: True,
            current_device=lambda: 0,
            get_device_name=lambda index: name,
            get_amp_supported_dtype=lambda: [torch.float16, *([torch.bfloat16] if bf16 else []), torch.float32],
            matmul=SimpleNamespace(allow_hf32=False),
            conv=SimpleNamespace(allow_hf32=True),
        )
        library: Any = ModuleType("torch_npu")
        library.__spec__ = ModuleSpec("torch_npu", None)
        library._C = SimpleNamespace(_npu_get_soc_version=lambda: number)
        library.npu = SimpleNamespace(utils=SimpleNamespace(is_support_inf_nan=lambda: inf_nan))
        monkeypatch.setitem(sys.modules, "torch_npu", library)
        monkeypatch.setattr(torch, "npu", device, raising=False)
        ascend.load.cache_clear()
        return device

    return install


@pytest.fixture
def intel_gpu(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A machine with one Intel GPU."""

    def install(name: str, *, matrix_units: bool = True, units: int = 512, bf16: bool = True) -> None:
        found = SimpleNamespace(
            name=name, has_subgroup_matrix_multiply_accumulate=matrix_units, max_compute_units=units
        )
        monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device=None: found)
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation=True: bf16)

    return install


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A Mac with a GPU; macOS 14 on Apple silicon unless said otherwise."""

    def install(*, macos: int = 14, machine: str = "arm64") -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2")
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)
        monkeypatch.setattr(platform, "machine", lambda: machine)

    return install


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A CPU with these instruction sets, and what oneDNN says of BF16 and FP16 there."""

    def install(architecture: str, *sets: str, bf16: bool, fp16: bool = False) -> None:
        flags = {"architecture": architecture, "cpu_name": "a CPU", **dict.fromkeys(sets, True)}
        onednn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: bf16, _is_mkldnn_fp16_supported=lambda: fp16)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
        monkeypatch.setattr(torch.ops, "mkldnn", onednn)

    return install


@pytest.fixture
def in_child() -> Callable[[Callable[[], Any]], Any]:
    """Run a function in a copy of this process and give back its JSON value.

    PyTorch's flags cannot all be put back once written (that is what is tested), so tests that
    write them do it where it ends with the child. The function must start no threads.
    """

    def run(function: Callable[[], Any]) -> Any:
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork in a threaded process
            child = os.fork()
        if child == 0:
            try:
                answer = {"value": function()}
            except BaseException as error:  # noqa: BLE001 - reported to the parent
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = json.loads(pipe.read())
        os.waitpid(child, 0)
        assert "error" not in answer, answer
        return answer["value"]

    return run
