"""What this machine can do, as facts: its devices, their formats, measured rates, traps, settings, versions."""

from __future__ import annotations

from dataclasses import asdict
from operator import attrgetter
from typing import Any

import torch

from deepseek_mp.backends import capabilities, default_device
from deepseek_mp.backends.detect import as_device
from deepseek_mp.precision import FORMATS
from deepseek_mp.workloads.fp8_pays import fp8_pays
from deepseek_mp.workloads.machine import describe_machine
from deepseek_mp.workloads.rates import Rate, matmul_rates

FP32_SETTINGS = {
    "cpu": ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
    "cuda": ("cuda.matmul", "cudnn.conv", "cudnn.rnn"),
}
"""By device type, what decides how FP32 products are really computed; names within `torch.backends`."""
SWITCHES = {
    "cuda": (
        "cudnn.benchmark",
        "cuda.matmul.allow_fp16_reduced_precision_reduction",
        "cuda.matmul.allow_bf16_reduced_precision_reduction",
        "cuda.matmul.allow_fp16_accumulation",
    )
}
"""Further settings that change results or speed without any error."""


def examine(device: torch.device | str | None = None, *, measure: bool = True) -> dict[str, Any]:
    """The facts as JSON values.

    Args:
        device: the one to examine; None: every device of this machine, the one that training would
            use first.
        measure: measure matrix products, and a linear layer in FP8 where the device has that; a few
            seconds per device.
    """
    places = all_devices() if device is None else [as_device(device)]
    return {
        "machine": describe_machine(places[0]),
        "devices": [examine_device(place, measure=measure) for place in places],
    }


def all_devices() -> list[torch.device]:
    """The accelerators PyTorch can use, then the CPU; the default device is the first."""
    found = [default_device()]
    if found[0].type != "cpu":
        found += [torch.device(found[0].type, index) for index in range(1, torch.accelerator.device_count())]
        found.append(torch.device("cpu"))
    return found


def examine_device(device: torch.device, *, measure: bool) -> dict[str, Any]:
    """One device: capabilities, settings as found and, if asked for, rates and where FP8 pays."""
    found = capabilities(device)
    settings = settings_of(device)
    rates = matmul_rates(device) if measure else []
    return {
        "device": str(device),
        **found.to_json(),
        "recommended_short": str(found.recommended),
        "settings": settings,
        "warnings": warnings_of(settings),
        "rates": [asdict(rate) for rate in rates],
        "fp8": fp8_pays(device).to_json() if measure else None,
        "advice": advice(rates, found.recommended.compute),
    }


def settings_of(device: torch.device) -> dict[str, Any]:
    """Hidden settings as they are now; an FP32 setting of 'none' follows the setting above it."""
    names = (
        *(f"{name}.fp32_precision" for name in FP32_SETTINGS.get(device.type, ())),
        *SWITCHES.get(device.type, ()),
    )
    return {f"torch.backends.{name}": attrgetter(name)(torch.backends) for name in names}


def warnings_of(settings: dict[str, Any]) -> list[str]:
    """What the settings mean for code that takes them as they are."""
    return [
        f"{name} is {value!r}: products of fp32 tensors may be computed in {value}"
        for name, value in settings.items()
        if name.endswith("fp32_precision") and value not in ("ieee", "none")
    ]


def advice(rates: list[Rate], recommended: str) -> str:
    """How the measured rate of the recommended format compares with FP32's; empty if it was not measured."""
    measured = {rate.format: rate.gflops for rate in rates}
    fast, full = measured.get(recommended), measured.get("fp32")
    if recommended == "fp32" or not fast or not full:
        return ""
    return f"large products in {recommended} run {fast / full:.1f} times as fast as in fp32"


def formats_of(device: dict[str, Any]) -> dict[str, str]:
    """Every known format of an examined device: native, emulated or absent."""
    native, emulated = set(device["matmul_formats"]), set(device["emulated_formats"])
    return {name: "native" if name in native else "emulated" if name in emulated else "absent" for name in FORMATS}
