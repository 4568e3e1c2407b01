"""The table and the value made of it: what a device may be asked, and what it answers."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from deepseek_mp.backends import Capabilities, Identity
from deepseek_mp.backends.capabilities import markdown_table, resolve, table
from deepseek_mp.errors import FormatError
from deepseek_mp.precision import FORMATS

DOCS = Path(__file__).parents[2] / "docs" / "backends.md"
SIXTEEN_BIT = frozenset({"bf16", "fp16"})
ROWS = list(table())


def device(row: str | None, name: str = "a device", **identity: object) -> Capabilities:
    found = Identity(row=row, device_name=name, **identity)  # type: ignore[arg-type]
    return resolve(found, vendor="someone", backend="cuda", executes=SIXTEEN_BIT)


# ------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("row", ROWS)
def test_a_row_does_not_contradict_itself(row: str) -> None:
    data = table()[row]
    formats = set(data["matmul_formats"])
    combination = data["recommended"]
    assert formats <= FORMATS.keys()
    assert {combination["compute"], combination["fallback"], combination["master"]} <= formats
    assert combination["master"] == "fp32"
    assert combination["loss_scaling"] == (combination["compute"] == "fp16")
    assert not formats & set(data.get("emulated_formats", ()))
    assert set(data.get("flushes_subnormals", ())) <= formats
    assert set(data.get("peak_tflops", {})) <= formats | set(data.get("other_formats", ()))
    for fast in ("tf32", "hf32"):
        assert (fast in formats) == data["fast_fp32"].startswith(fast)
    assert not {"fp8_e4m3", "fp8_e4m3fnuz"} <= formats
    assert data["overflow"] in ("ieee", "saturate")
    assert data["confidence"] in ("A", "B", "C")


def test_every_row_has_a_known_source() -> None:
    text = (Path(__import__("deepseek_mp.backends").backends.__path__[0]) / "capabilities.json").read_text()
    known = json.loads(text)["sources"]
    assert all(data["sources"] and set(data["sources"]) <= known.keys() for data in table().values())


def test_no_two_rows_of_a_backend_answer_to_the_same_device() -> None:
    keys = [(row["backend"], json.dumps(row["detect"])) for row in table().values()]
    assert len(keys) == len(set(keys))


def test_the_documentation_shows_the_table() -> None:
    assert markdown_table() in DOCS.read_text(encoding="utf-8"), (
        "docs/backends.md differs from capabilities.json: paste the output of "
        "deepseek_mp.backends.capabilities.markdown_table()"
    )


# -------------------------------------------------------------------------------- the value


def test_capabilities_are_frozen_and_hashable() -> None:
    found = device("sm_90", "NVIDIA H200")
    assert hash(found) == hash(device("sm_90", "NVIDIA H200"))
    assert found == device("sm_90", "NVIDIA H200")
    assert found != device("sm_90", "NVIDIA H100 PCIe")
    with pytest.raises(dataclasses.FrozenInstanceError, match="overflow"):
        found.overflow = "saturate"  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        found.peak_tflops["bf16"] = 1.0  # type: ignore[index]


@pytest.mark.parametrize("row", [*ROWS, None])
def test_capabilities_survive_json(row: str | None) -> None:
    found = device(row)
    data = json.loads(json.dumps(found.to_json()))
    assert set(data) == {field.name for field in dataclasses.fields(found)}
    assert data["recommended"] == dataclasses.asdict(found.recommended)
    assert data["matmul_formats"] == [name for name in FORMATS if name in found.matmul_formats]


@pytest.mark.parametrize(
    ("row", "order"),
    [
        ("sm_70", ("fp16", "fp32")),
        ("sm_80", ("bf16", "fp16", "tf32", "fp32")),
        ("gfx908", ("fp16", "bf16", "fp32")),
        ("ascend910b", ("fp16", "bf16", "hf32", "fp32")),
        ("x86_avx2", ("fp32",)),
        (None, ("fp32",)),
    ],
)
def test_admissible_formats_are_native_and_the_best_guess_is_first(row: str | None, order: tuple[str, ...]) -> None:
    assert device(row).admissible() == order


@pytest.mark.parametrize(
    ("row", "names", "others"),
    [
        ("sm_70", ["Tesla V100-SXM2-32GB"], ["Tesla V100-PCIE-16GB"]),
        ("sm_75", ["Tesla T4"], ["NVIDIA GeForce RTX 2080 Ti", "NVIDIA T400"]),
        ("sm_80", ["NVIDIA A100-SXM4-80GB"], ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A30"]),
        ("sm_86", ["NVIDIA A40"], ["NVIDIA GeForce RTX 3090", "NVIDIA RTX A4000"]),
        ("sm_90", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"], ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL"]),
        ("sm_120", ["NVIDIA GeForce RTX 5090"], ["NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 5070"]),
        ("gfx942", ["AMD Instinct MI300X", "AMD Instinct MI325X"], ["AMD Instinct MI300A"]),
        ("ascend910b", ["Ascend910B2", "Ascend910B2C"], ["Ascend910B3"]),
    ],
)
def test_a_peak_is_stated_only_for_the_product_it_is_of(row: str, names: list[str], others: list[str]) -> None:
    assert all(device(row, name).peak_tflops == table()[row]["peak_tflops"] for name in names)
    assert [name for name in others if device(row, name).peak_tflops] == []


def test_one_mi250x_device_is_half_a_package() -> None:
    assert device("gfx90a", "AMD Instinct MI250X").peak_tflops["fp16"] == 383 / 2


def test_a_near_relative_of_a_chip_has_its_formats_but_not_its_peak() -> None:
    found = device("sm_86", "NVIDIA A40", exact=False)
    assert "bf16" in found.matmul_formats
    assert not found.peak_tflops


def test_a_part_without_its_familys_units_is_recommended_fp32() -> None:
    found = device("aarch64", dropped=frozenset({"bf16"}))
    assert (str(found.recommended), found.recommended.reason) == (
        "FP32",
        "this part lacks the bf16 units of its family",
    )
    assert "bf16" in found.emulated_formats


# ---------------------------------------------------------------------------------- require


def test_require_says_native_or_emulated() -> None:
    t4 = device("sm_75")
    assert t4.require("fp16", emulate=False) is True
    assert t4.require("bf16", emulate=True) is False


@pytest.mark.parametrize(
    ("row", "format", "nearest"),
    [
        ("sm_75", "bf16", "fp16"),
        ("x86_avx512_bf16", "fp16", "bf16"),
        ("x86_avx2", "bf16", "fp32"),
        ("sm_70", "tf32", "fp32"),
        ("sm_90", "hf32", "tf32"),
        ("ascend910b", "tf32", "hf32"),
        ("gfx942", "fp8_e4m3", "fp8_e4m3fnuz"),
        ("gfx950", "fp8_e5m2fnuz", "fp8_e5m2"),
        ("sm_80", "fp8_e4m3", "bf16"),
        (None, "bf16", "fp32"),
    ],
)
def test_a_lacking_format_is_an_error_that_names_the_nearest(row: str | None, format: str, nearest: str) -> None:
    found = device(row, "this device")
    message = rf"this device \({found.id}\) does not multiply {format}\. Allowed: .*fp32.*\. Use '{nearest}'"
    with pytest.raises(FormatError, match=message):
        found.require(format, emulate=False)


@pytest.mark.parametrize("format", ["tf32", "hf32"])
def test_formats_of_matrix_units_cannot_be_emulated(format: str) -> None:
    with pytest.raises(FormatError, match=rf"does not multiply {format}.*Use 'fp32', the nearest it has\.$"):
        device("sm_70").require(format, emulate=True)


def test_the_way_out_is_offered_only_where_it_exists() -> None:
    with pytest.raises(FormatError, match="pass emulate=True"):
        device("sm_75").require("bf16", emulate=False)
    with pytest.raises(FormatError, match=re.escape("the nearest it has.")):
        device("sm_80").require("fp8_e4m3", emulate=True)


def test_an_unknown_format_is_not_a_missing_one() -> None:
    with pytest.raises(FormatError, match="unknown format 'bf61'"):
        device("sm_80").require("bf61", emulate=False)
