"""Detection: every row of the table from what its device reports, plug-ins, unknown devices."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_mp.backends import Capabilities, backend_for, capabilities, default_device, detect, numbered
from deepseek_mp.backends.capabilities import table
from deepseek_mp.backends.detect import BUILT_IN, GROUP, as_device
from deepseek_mp.errors import ConfigError

BASE = "fp64 fp32 "
CUDA8 = BASE + "tf32 bf16 fp16 int8"
OCP = " fp8_e4m3 fp8_e5m2"
EXPECTED: dict[str, tuple[str, tuple[Any, ...], str, str, str]] = {
    # row: how the device is made, what it reports, native formats, overflow, recommended combination
    "sm_70": ("nvidia", (7, 0), BASE + "fp16", "ieee", "FP16+FP32"),
    "sm_75": ("nvidia", (7, 5), BASE + "fp16 int8", "ieee", "FP16+FP32"),
    "sm_80": ("nvidia", (8, 0), CUDA8, "ieee", "BF16+FP32"),
    "sm_86": ("nvidia", (8, 6), CUDA8, "ieee", "BF16+FP32"),
    "sm_89": ("nvidia", (8, 9), CUDA8 + OCP, "ieee", "BF16+FP32"),
    "sm_90": ("nvidia", (9, 0), CUDA8 + OCP, "ieee", "BF16+FP32"),
    "sm_100": ("nvidia", (10, 0), CUDA8 + OCP + " fp4_e2m1", "ieee", "BF16+FP32"),
    "sm_103": ("nvidia", (10, 3), CUDA8 + OCP + " fp4_e2m1", "ieee", "BF16+FP32"),
    "sm_120": ("nvidia", (12, 0), CUDA8 + OCP + " fp4_e2m1", "ieee", "BF16+FP32"),
    "gfx908": ("amd", ("gfx908:sramecc+:xnack-",), BASE + "bf16 fp16 int8", "ieee", "FP16+FP32"),
    "gfx90a": ("amd", ("gfx90a:sramecc+:xnack-",), BASE + "bf16 fp16 int8", "ieee", "FP16+FP32"),
    "gfx942": ("amd", ("gfx942:sramecc+:xnack-",), CUDA8 + " fp8_e4m3fnuz fp8_e5m2fnuz", "ieee", "BF16+FP32"),
    "gfx950": ("amd", ("gfx950:sramecc+:xnack-",), BASE + "bf16 fp16 int8 fp4_e2m1" + OCP, "ieee", "BF16+FP32"),
    "gfx110x": ("amd", ("gfx1100",), BASE + "bf16 fp16 int8", "ieee", "BF16+FP32"),
    "gfx120x": ("amd", ("gfx1201",), BASE + "bf16 fp16 int8" + OCP, "ieee", "BF16+FP32"),
    "ascend910_gen1": ("npu", (104, "Ascend910B", False), "fp32 fp16 int8", "saturate", "FP16+FP32"),
    "ascend910b": ("npu", (223, "Ascend910B3", True), "fp32 hf32 bf16 fp16 int8", "ieee", "FP16/HF32+FP32"),
    "ascend910c": ("npu", (250, "Ascend910_9391", True), "fp32 hf32 bf16 fp16 int8", "ieee", "FP16/HF32+FP32"),
    "ascend950": ("npu", (260, "Ascend950PR", True), "fp32 hf32 bf16 fp16 int8" + OCP, "ieee", "FP16/HF32+FP32"),
    "x86_amx": ("processor", ("x86_64", "amx_bf16", "avx512_bf16"), BASE + "bf16 int8", "ieee", "BF16+FP32"),
    "x86_avx512_bf16": ("processor", ("x86_64", "avx512_bf16"), BASE + "bf16 int8", "ieee", "BF16+FP32"),
    "x86_avx2": ("processor", ("x86_64", "avx2"), BASE, "ieee", "FP32"),
    "aarch64": ("processor", ("aarch64", "bf16", "i8mm"), BASE + "bf16 int8", "ieee", "BF16+FP32"),
    "xpu_pvc": (
        "intel_gpu",
        ("Intel(R) Data Center GPU Max 1550",),
        BASE + "tf32 bf16 fp16 int8",
        "ieee",
        "BF16+FP32",
    ),
    "xpu_bmg": ("intel_gpu", ("Intel(R) Arc(TM) B580 Graphics",), "fp32 bf16 fp16 int8", "ieee", "BF16+FP32"),
    "mps": ("apple", (), "fp32 bf16 fp16", "ieee", "FP16+FP32"),
}
DEVICE = {"nvidia": "cuda:0", "amd": "cuda:0", "npu": "npu:0", "processor": "cpu", "intel_gpu": "xpu:0", "apple": "mps"}


def make(request: pytest.FixtureRequest, kind: str, reports: tuple[Any, ...]) -> Capabilities:
    """Capabilities of the device that `kind`'s fixture makes."""
    options: dict[str, Any] = {}
    if kind == "npu":
        *reports, modern = reports  # type: ignore[assignment]
        options = {"inf_nan": modern, "bf16": modern}
    if kind == "processor":
        options = {"bf16": "avx2" not in reports}
    request.getfixturevalue(kind)(*reports, **options)
    if kind == "npu":  # PyTorch knows the name only once torch_npu is really loaded
        backend = next(b for b in BUILT_IN if b.name == "ascend")
        return backend.capabilities(torch.device("meta", 0))
    return capabilities(DEVICE[kind])


def test_the_expectations_cover_the_table() -> None:
    assert list(EXPECTED) == list(table())


@pytest.mark.parametrize("row", EXPECTED)
def test_every_row_is_found_from_what_its_device_reports(request: pytest.FixtureRequest, row: str) -> None:
    kind, reports, formats, overflow, recommended = EXPECTED[row]
    found = make(request, kind, reports)
    assert found.id == row
    assert found.matmul_formats == set(formats.split())
    assert found.overflow == overflow
    assert str(found.recommended) == recommended
    assert found.recommended.loss_scaling == recommended.startswith("FP16")
    assert found.admissible()[0] == found.recommended.compute
    assert found.recommended.reason


@pytest.mark.parametrize("row", EXPECTED)
def test_only_gfx942_has_fnuz_and_only_gfx90a_flushes(request: pytest.FixtureRequest, row: str) -> None:
    found = make(request, *EXPECTED[row][:2])
    assert any(name.endswith("fnuz") for name in found.matmul_formats) == (row == "gfx942")
    assert found.smallest_useful("fp16") == (2.0**-14 if row == "gfx90a" else 2.0**-24)
    assert found.smallest_useful("bf16") == (2.0**-126 if row == "gfx90a" else 2.0**-133)


@pytest.mark.parametrize(
    ("kind", "reports"),
    [
        ("nvidia", (6, 0)),
        ("nvidia", (11, 0)),
        ("nvidia", (13, 0)),
        ("amd", ("gfx900",)),
        ("amd", ("gfx906:sramecc+:xnack-",)),
        ("amd", ("gfx1030",)),
        ("amd", ("gfx1250",)),
        ("npu", (202, "Ascend310P3", True)),
        ("intel_gpu", ("Intel(R) Arc(TM) A770 Graphics",)),
        ("processor", ("ppc64le", "vsx")),
    ],
)
def test_an_unknown_device_gets_fp32_and_no_peak(request: pytest.FixtureRequest, kind: str, reports: Any) -> None:
    found = make(request, kind, reports)
    assert (found.id, found.admissible(), dict(found.peak_tflops)) == ("unknown", ("fp32",), {})
    assert (str(found.recommended), found.recommended.reason) == ("FP32", "unknown device")


def test_a_device_type_without_a_backend_gets_fp32() -> None:
    found = capabilities("meta")
    assert (found.id, found.admissible(), found.recommended.reason) == ("unknown", ("fp32",), "unknown device")
    assert backend_for("meta").peak_memory_bytes(torch.device("meta")) is None
    assert backend_for("meta").peak_reserved_bytes(torch.device("meta")) is None
    assert not backend_for("meta").reset_peak_memory(torch.device("meta"))
    backend_for("meta").synchronize(torch.device("meta"))


def test_a_device_this_machine_lacks_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no 'xpu' device can be used\. Allowed: .*cpu"):
        capabilities("xpu")


def test_a_misspelt_device_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"device 'gpu' is not known to this PyTorch\. Allowed: .*cpu"):
        as_device("gpu")
    with pytest.raises(ConfigError, match=r"device 1\.5 is not known"):
        as_device(1.5)  # type: ignore[arg-type]


def test_the_default_is_the_accelerator_and_else_the_cpu(
    monkeypatch: pytest.MonkeyPatch, intel_gpu: Callable[..., None]
) -> None:
    for backend in BUILT_IN:
        if backend.name not in ("cpu", "xpu"):
            monkeypatch.setattr(backend, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")
    intel_gpu("Intel(R) Arc(TM) B580 Graphics")
    assert default_device() == torch.device("xpu")


def test_capabilities_are_asked_of_the_device_once(
    monkeypatch: pytest.MonkeyPatch, nvidia: Callable[..., None]
) -> None:
    nvidia(9, 0, "NVIDIA H200")
    first = capabilities("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    assert capabilities("cuda:0") is first


# ---------------------------------------------------------------------------------- plug-ins

WORKING = """
import torch
from deepseek_mp.backends import Backend, Capabilities, Combination, Identity

class Plugin(Backend):
    name, vendor, device_type = "acme", "Acme", "hpu"
    executes = frozenset({"fp16"})
    def is_available(self):
        return True
    def identify(self, device):
        return Identity(row=None, device_name="Acme One")
"""


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a distribution with one entry point of our group on the path."""

    def install(source: str, target: str) -> None:
        (tmp_path / "acme_backend.py").write_text(source)
        info = tmp_path / "acme_backend-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-backend\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\nacme = {target}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(__import__("sys").modules, "acme_backend", raising=False)

    return install


def test_a_plugin_answers_for_its_devices_and_is_the_default(install_plugin: Callable[[str, str], None]) -> None:
    install_plugin(WORKING, "acme_backend:Plugin")
    assert backend_for("hpu:0").name == "acme"
    assert default_device() == torch.device("hpu")
    found = capabilities("hpu:0")
    assert (found.backend, found.device_name, found.id) == ("acme", "Acme One", "unknown")
    assert found.require("fp16", emulate=True) is False


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("raise ImportError('libacme.so is missing')", "acme_backend:Plugin", "ImportError: libacme.so is missing"),
        (WORKING, "acme_backend:Absent", "AttributeError"),
        ("class Plugin:\n    pass", "acme_backend:Plugin", "no subclass of deepseek_mp.backends.Backend"),
        (WORKING.replace("return True", "raise OSError('no driver')"), "acme_backend:Plugin", "OSError: no driver"),
        (WORKING.replace("def identify", "def identity"), "acme_backend:Plugin", "TypeError"),
    ],
)
def test_a_broken_plugin_is_skipped_with_one_warning(
    install_plugin: Callable[[str, str], None], source: str, target: str, why: str
) -> None:
    install_plugin(source, target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert capabilities("cpu").backend == "cpu"
        assert backend_for("hpu:0").name == "unlisted"
    messages = [str(w.message) for w in caught if "plug-in" in str(w.message)]
    assert len(messages) == 1
    assert messages[0].startswith(f"backend plug-in 'acme' ({target}) does not work and is skipped")
    assert why in messages[0]


@pytest.mark.parametrize(
    ("name", "found"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("meta", "meta"), ("xpu", "xpu")]
)
def test_a_device_in_use_without_a_number_is_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, found: str
) -> None:
    monkeypatch.setattr(type(backend_for("cuda")), "is_available", lambda self: True)
    monkeypatch.setattr(detect, "_is_current_accelerator", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert str(numbered(name)) == found
