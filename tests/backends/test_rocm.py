"""AMD: architectures by name, compute capabilities that look like Blackwell's, fp8 by ROCm release."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepseek_mp.backends import backend_for, capabilities, energy_joules, fp32_mode

Install = Callable[..., None]


def test_a_radeon_whose_compute_capability_looks_newer_than_blackwell_is_no_blackwell(amd: Install) -> None:
    amd("gfx1100", "AMD Radeon RX 7900 XTX")
    properties = torch.cuda.get_device_properties()
    assert (properties.major, properties.minor) >= (10, 0)  # what a check of compute capability would see
    found = capabilities("cuda:0")
    assert (found.backend, found.vendor, found.id) == ("rocm", "amd", "gfx110x")
    assert not any(name.startswith(("fp4", "fp8")) for name in found.matmul_formats)


@pytest.mark.parametrize(
    ("architecture", "row"),
    [
        ("gfx90a:sramecc+:xnack-", "gfx90a"),
        ("gfx90a:sramecc-:xnack+", "gfx90a"),
        ("gfx942", "gfx942"),
        ("gfx1101", "gfx110x"),
        ("gfx1103", "gfx110x"),
        ("gfx1151", "gfx110x"),
        ("gfx1200", "gfx120x"),
        ("gfx1201", "gfx120x"),
        ("gfx1250", "unknown"),
        ("gfx90c", "unknown"),
    ],
)
def test_the_architecture_is_the_part_of_the_name_before_the_colon(amd: Install, architecture: str, row: str) -> None:
    amd(architecture)
    assert capabilities("cuda:0").id == row


def test_bf16_is_not_believed_although_pytorch_says_yes_on_any_hip_build(amd: Install) -> None:
    amd("gfx900")
    assert torch.cuda.is_bf16_supported(including_emulation=False)
    found = capabilities("cuda:0")
    assert found.admissible() == ("fp32",)
    assert "architecture gfx900" in found.notes


def test_mi250x_trains_in_fp16_above_the_flushed_subnormals(amd: Install) -> None:
    amd("gfx90a:sramecc+:xnack-", "AMD Instinct MI250X")
    found = capabilities("cuda:0")
    assert str(found.recommended) == "FP16+FP32"
    assert found.flushes_subnormals == {"fp16", "bf16"}
    assert found.smallest_useful("fp16") == 2.0**-14
    assert found.smallest_useful("fp32") == 2.0**-149
    assert "2**-14" in found.recommended.reason


@pytest.mark.parametrize(
    ("architecture", "rocm", "fp8"),
    [
        ("gfx950", "6.4.43482-0f2d60242", False),
        ("gfx950", "6.5.0", True),
        ("gfx1201", "6.2.41134", False),
        ("gfx1201", "6.3.42131", True),
        ("gfx950", "7.10.0", True),
    ],
)
def test_fp8_needs_a_rocm_that_has_it(amd: Install, architecture: str, rocm: str, fp8: bool) -> None:
    amd(architecture, rocm=rocm)
    assert ("fp8_e4m3" in capabilities("cuda:0").matmul_formats) == fp8


def test_mi300_has_the_other_fp8(amd: Install) -> None:
    amd("gfx942:sramecc+:xnack-", rocm="6.2.0")
    found = capabilities("cuda:0")
    assert {"fp8_e4m3fnuz", "fp8_e5m2fnuz"} <= found.matmul_formats
    assert "fp8_e4m3" not in found.matmul_formats


def test_energy_and_hidden_tf32_of_convolutions_are_not_claimed(amd: Install) -> None:
    amd("gfx942:sramecc+:xnack-")
    assert energy_joules("cuda:0") is None
    assert fp32_mode("cuda:0", "conv") == "ieee"
    assert backend_for("cuda:0").name == "rocm"
