"""`deepseek-mp demo`: train two small models on real data in FP32 and in `auto`, and compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deepseek_mp.cli.common_options import Seed
from deepseek_mp.cli.output import print_json
from deepseek_mp.workloads.demo import Comparison, Run, run_demo


def demo(
    task: Annotated[str | None, typer.Option(help="Only this task: digits or text.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of small models.")] = False,
    device: Annotated[str | None, typer.Option(help="Where to train, as in PyTorch: cpu, cuda:0.")] = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Train a ResNet on handwritten digits and a GPT on Python's own source text, in fp32 and in auto.

    Needs no download. Prints for each: loss, accuracy, time per step, peak memory, formats used,
    and why auto chose what it chose.
    """
    result = run_demo(only=task, quick=quick, device=device, seed=seed)
    if as_json:
        print_json(result.to_json())
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for comparison in result.comparisons:
        console.print(_table(comparison, result.device))
        auto = comparison.runs[-1]
        console.print(f"auto: {auto.reason}")
        console.print(f"speed-up over fp32: {comparison.speedup:.2f}x\n")


def _table(comparison: Comparison, device: str) -> Table:
    """One column per run."""
    table = Table(title=f"{comparison.title} ({comparison.runs[0].steps} steps on {device})", title_justify="left")
    table.add_column("")
    for run in comparison.runs:
        table.add_column(run.mode, justify="right")
    columns = [_cells(run) for run in comparison.runs]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _cells(run: Run) -> dict[str, str]:
    memory = "unknown" if run.peak_memory_mib is None else f"{run.peak_memory_mib:.1f} MiB"
    layout = "" if run.memory_format == "contiguous" else f", {run.memory_format}"
    return {
        "format": f"{run.format}{layout}",
        "loss, first step": f"{run.first_loss:.4f}",
        "loss, last steps": f"{run.last_loss:.4f}",
        "validation loss": f"{run.validation_loss:.4f}",
        "validation accuracy": f"{100 * run.validation_accuracy:.1f} %",
        "time per step (median)": f"{run.step_ms:.2f} ms",
        "peak memory of a step": memory,
        "operations by format": _counts(run.operations),
        "ran in a wider format": _counts(run.fallbacks),
        "whole run": f"{run.total_s:.1f} s",
    }


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in numbers.items()) or "none"
