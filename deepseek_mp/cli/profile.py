"""`deepseek-mp profile TARGET`: what each precision would do to each layer of the user's model, and the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepseek_mp.cli.common_options import Seed, read_names
from deepseek_mp.cli.output import check_writable
from deepseek_mp.cli.profile_question import Question
from deepseek_mp.cli.profiling import answer
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision.planning import NOISE_BUDGET, SMALL_LOSS, check_budget
from deepseek_mp.profiler.profiler import BATCHES


def profile(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="file.py:function or module:function.")],
    *,
    budget: Annotated[float, typer.Option(help="Relative rise of the loss that all layers may cause.")] = SMALL_LOSS,
    noise_budget: Annotated[float, typer.Option(help="Variance added to the gradient, relative.")] = NOISE_BUDGET,
    recipes: Annotated[str | None, typer.Option(help="Formats and recipes, as in bf16,row.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="At most so many are looked at.")] = BATCHES,
    verify: Annotated[int, typer.Option(min=0, help="Measure the true change too, for so many layers.")] = 0,
    by_role: Annotated[bool, typer.Option("--by-role", help="Let a layer's three products differ.")] = False,
    emulate: Annotated[bool, typer.Option("--emulate", help="Choose from what the device lacks, too.")] = False,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time the layers.")] = True,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Look at batches, or at weights alone.")] = True,
    resume: Annotated[Path | None, typer.Option(help="A file that keeps what was measured.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report there, as JSON.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Write the plan there, for train --precision.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to measure, as in PyTorch: cpu, cuda:0.")] = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what each precision would do to each layer of what TARGET returns, and which is best within budgets.

    TARGET is a function of your own, called without arguments, that returns (model, loader, loss_fn) or a mapping with
    these keys. With metric and tolerance in place of a loader: the lowest precision that holds the metric.
    """
    check_budget(budget, noise_budget)
    for path, option in ((out, "--out"), (plan, "--plan"), (resume, "--resume")):
        if path is not None:
            check_writable(path, option)
    if plan is not None and not data:
        raise ConfigError(explain("--plan with --no-data", "a plan from batches", "Leave one of them out"))
    question = Question(
        recipes=read_names(recipes, "--recipes"),
        budget=budget,
        noise_budget=noise_budget,
        batches=batches,
        verify=verify,
        by_role=by_role,
        emulate=emulate,
        timed=timed,
        data=data,
        resume=resume,
        device=device,
        seed=seed,
    )
    answer(target, question).deliver(out=out, plan=plan, as_json=as_json)
