"""`deepseek-mp report`: say what a run did, or where two runs part."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from deepseek_mp.cli.output import print_json
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.records.lines import to_plain
from deepseek_mp.report import compare_runs, render_difference, render_report, report_run
from deepseek_mp.report.curve import ASCII_BLOCKS, BLOCKS
from deepseek_mp.report.difference import TOLERANCE

PIPE_WIDTH = 120
"""Characters a line, where nothing says how wide the terminal is."""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="The run directory; with --diff, two.")],
    diff: Annotated[bool, typer.Option("--diff", help="Compare two runs.")] = False,
    tolerance: Annotated[
        float, typer.Option(help="With --diff: relative difference from which two values count as parted.")
    ] = TOLERANCE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what a run did: its loss, time, memory, skipped steps, and the precision of every layer with the reason.

    With --diff and two run directories: in which settings, precision, decisions and numbers they part.
    """
    if len(runs) != (2 if diff else 1):
        passed = f"{len(runs)} run directories {'with' if diff else 'without'} --diff"
        raise ConfigError(explain(passed, "one, or two with --diff", "Name as many directories"))
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    if diff:
        difference = compare_runs(*runs, tolerance=tolerance)
        _print(difference.to_json() if as_json else render_difference(difference, width))
    else:
        found = report_run(runs[0])
        _print(found.to_json() if as_json else render_report(found, width, ASCII_BLOCKS if _is_ascii() else BLOCKS))


def _print(result: object) -> None:
    """Text with what the terminal can show, or JSON in which numbers that are not finite are words, as in a record."""
    if not isinstance(result, str):
        print_json(to_plain(result, "report"))
        return
    encoding = sys.stdout.encoding or "utf-8"
    print(result.encode(encoding, "replace").decode(encoding))


def _is_ascii() -> bool:
    """Whether standard output has no blocks to draw a curve with."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return True
    return False
