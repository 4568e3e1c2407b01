"""The program: its commands, and how it ends.

Exit status 0 is success, 1 a failure of the run, 2 a mistake of the caller, 130 an interruption. Mistakes
and failures are one line on standard error; a defect of this package keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from deepseek_mp.cli.bench import bench
from deepseek_mp.cli.demo import demo
from deepseek_mp.cli.doctor import doctor
from deepseek_mp.cli.profile import profile
from deepseek_mp.cli.report import report
from deepseek_mp.cli.train import train
from deepseek_mp.errors import MixedPrecisionError
from deepseek_mp.version import __version__

PROGRAM = "deepseek-mp"

app = typer.Typer(
    name=PROGRAM,
    help="Mixed-precision training that decides by measurement and explains every choice.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(doctor)
app.command()(profile)
app.command()(train)
app.command()(report)
app.add_typer(bench, name="bench")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"deepseek-mp {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on `arguments` (those of the process if None) and return its exit status."""
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except (TyperException, MixedPrecisionError) as error:
        return _refuse(error)
    return status if isinstance(status, int) else 0


def _refuse(error: TyperException | MixedPrecisionError) -> int:
    usage = isinstance(error, TyperException)
    text = (
        f"{error.format_message()} (see {_command(error)} --help)" if isinstance(error, TyperException) else str(error)
    )
    print(f"deepseek-mp: {' '.join(text.split())}", file=sys.stderr)
    return 2 if usage or isinstance(error, ValueError) else 1


def _command(error: TyperException) -> str:
    """The command that the mistake is about, as it is typed."""
    context = getattr(error, "ctx", None)
    return PROGRAM if context is None else context.command_path
