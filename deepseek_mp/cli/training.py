"""A fit on the command line: Ctrl-C on the way, and what is said at the end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import typer

from deepseek_mp.cli.decisions import told
from deepseek_mp.cli.interrupt import INTERRUPTED, stopping
from deepseek_mp.cli.output import print_record, print_text, terminal_width
from deepseek_mp.cli.target import Target
from deepseek_mp.cli.training_options import Extent
from deepseek_mp.report import render_outcome, report_run
from deepseek_mp.trainer import FitResult, MixedPrecisionTrainer

NOTICE = "deepseek-mp: stopping after this step; Ctrl-C again stops at once"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A fit that ended, or was stopped."""

    result: FitResult
    where: Path
    stopped: bool

    def deliver(self, *, as_json: bool) -> None:
        """Print what the run did; a run that was stopped ends the program."""
        report = report_run(self.where)
        if as_json:
            print_record({"run_dir": self.where, "stopped": self.stopped, "run": report})
        else:
            print_text(f"{render_outcome(report, terminal_width())}\n")
            print_text(f"records and checkpoints: {self.where}; read them with deepseek-mp report {self.where}")
        if self.stopped:
            _end(f"stopped after step {self.result.steps_attempted}", self.where)


def fit(trainer: MixedPrecisionTrainer, found: Target, extent: Extent, *, resume: Path | None, where: Path) -> Outcome:
    """Train; an interrupt stops after the step under way, a second one at once."""
    try:
        with stopping(trainer.stop, NOTICE), told():
            result = trainer.fit(
                found.loader, extent.epochs, max_steps=extent.steps, val_loader=found.val_loader, resume=resume
            )
    except KeyboardInterrupt:
        _end("interrupted", where)
    return Outcome(result=result, where=where, stopped=trainer.stopping)


def _end(what: str, where: Path) -> NoReturn:
    """Say how to go on with a run that was interrupted, and end the program."""
    how = f"go on with the same command and --resume {where} in place of --run-dir"
    kept = any((where / "checkpoints").glob("step-*"))
    print(f"deepseek-mp: {what}; {how if kept else 'there is no checkpoint yet to go on from'}", file=sys.stderr)
    raise typer.Exit(INTERRUPTED)
