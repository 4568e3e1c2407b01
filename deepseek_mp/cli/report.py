"""`deepseek-mp report`: say what a run did, or where two runs part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepseek_mp.cli.output import is_ascii, print_record, print_text, terminal_width
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.report import compare_runs, render_difference, render_report, report_run
from deepseek_mp.report.curve import ASCII_BLOCKS, BLOCKS
from deepseek_mp.report.difference import TOLERANCE


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="The run directory; with --diff, two.")],
    diff: Annotated[bool, typer.Option("--diff", help="Compare two runs.")] = False,
    tolerance: Annotated[
        float, typer.Option(help="With --diff: relative difference from which two values count as parted.")
    ] = TOLERANCE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what a run did: its loss, time, memory, skipped steps, and the precision of every layer with the reason.

    With --diff and two run directories: in which settings, precision, storage, decisions, alarms, statistics of layers
    and numbers they part.
    """
    if len(runs) != (2 if diff else 1):
        passed = f"{len(runs)} run directories {'with' if diff else 'without'} --diff"
        raise ConfigError(explain(passed, "one, or two with --diff", "Name as many directories"))
    if diff:
        difference = compare_runs(*runs, tolerance=tolerance)
        if as_json:
            print_record(difference.to_json())
        else:
            print_text(render_difference(difference, terminal_width()))
        return
    found = report_run(runs[0])
    if as_json:
        print_record(found.to_json())
    else:
        print_text(render_report(found, terminal_width(), ASCII_BLOCKS if is_ascii() else BLOCKS))
