"""`deepseek-mp doctor`: describe what this machine can do."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deepseek_mp.cli.output import print_json
from deepseek_mp.workloads.doctor import examine, formats_of


def doctor(
    device: Annotated[str | None, typer.Option(help="Only this device, as in PyTorch: cpu, cuda:0.")] = None,
    measure: Annotated[bool, typer.Option(help="Measure matrix products, a few seconds per device.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Describe the devices, their number formats and measured speed, traps, hidden settings and versions."""
    with Console(stderr=True).status("measuring matrix products"):
        facts = examine(device, measure=measure)
    if as_json:
        print_json(facts)
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    machine = facts["machine"]
    versions = ", ".join(f"{name} {machine[name] or 'none'}" for name in ("python", "torch", "cuda", "cudnn"))
    console.print(f"deepseek_mp {machine['deepseek_mp']} on {machine['system']}: {versions}")
    console.print(f"CPU: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads in use\n")
    for found in facts["devices"]:
        _print_device(console, found)


def _print_device(console: Console, device: dict[str, Any]) -> None:
    """One device, from its name to its traps."""
    recommended = device["recommended"]
    console.print(f"{device['device']}: {device['device_name']} ({device['id']}, {device['vendor']})", style="bold")
    for kind in ("native", "emulated"):
        names = [name for name, state in formats_of(device).items() if state == kind]
        console.print(f"  formats, {kind}: {', '.join(names) or 'none'}")
    console.print(f"  recommended: {device['recommended_short']}: {recommended['reason']}")
    console.print(f"  loss scaling: {'needed' if recommended['loss_scaling'] else 'not needed'}")
    console.print(f"  overflow: {device['overflow']}; fast fp32: {device['fast_fp32']}")
    if device["flushes_subnormals"]:
        console.print(f"  subnormals read as zero in: {', '.join(device['flushes_subnormals'])}")
    if device["rates"]:
        console.print(_rates(device))
    fp8 = device["fp8"]["summary"] if device["fp8"] else ""
    for text in (device["advice"], fp8, *device["warnings"], *device["notes"]):
        if text:
            console.print(f"  - {text}")
    for name, value in device["settings"].items():
        console.print(f"  {name} = {value}")
    console.print()


def _rates(device: dict[str, Any]) -> Table:
    """Measured rates, beside the peak where it is known."""
    table = Table(title="matrix products, measured", title_justify="left")
    for heading in ("format", "GFLOP/s", "of peak", "size", ""):
        table.add_column(heading, justify="right" if heading in ("GFLOP/s", "of peak", "size") else "left")
    for rate in device["rates"]:
        peak = device["peak_tflops"].get(rate["format"])
        known = peak is not None and rate["gflops"] is not None
        share = f"{rate['gflops'] / peak / 10:.0f} %" if known else "unknown"
        speed = "-" if rate["gflops"] is None else f"{rate['gflops']:,.1f}"
        kind = "" if rate["native"] else "emulated"
        table.add_row(rate["format"], speed, share, str(rate["size"]), rate["problem"] or kind)
    return table
