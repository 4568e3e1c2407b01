"""What `deepseek-mp profile` was asked, measured."""

from __future__ import annotations

import sys

import typer

from deepseek_mp.cli.interrupt import INTERRUPTED
from deepseek_mp.cli.profile_answer import Answer
from deepseek_mp.cli.profile_question import Question
from deepseek_mp.cli.target import Target, load_target
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.profiler import PrecisionProfiler
from deepseek_mp.profiler.profiler import FORMATS_TRIED
from deepseek_mp.trainer.progress import Progress
from deepseek_mp.trainer.setup import check_arguments, choose_device, seed_everything


def answer(target: str, question: Question) -> Answer:
    """Call the user's function and analyse what it returns; progress goes to a terminal only."""
    seed_everything(question.seed)
    found = load_target(target)
    if question.device is not None or not found.by_metric:  # a metric knows where it runs the model
        check_arguments(found.model, None)
        found.model.to(choose_device(found.model, question.device))
    try:
        with Progress(None) as shown:
            return _metric(found, question, shown) if found.by_metric else _profile(found, question, shown)
    except KeyboardInterrupt:
        kept = question.resume is not None and question.resume.exists()
        how = f"the same command goes on from {question.resume}" if kept else "nothing is kept (--resume FILE keeps it)"
        print(f"deepseek-mp: interrupted; {how}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _metric(found: Target, question: Question, shown: Progress) -> Answer:
    question.check_for_metric()
    formats = question.recipes or FORMATS_TRIED
    report = PrecisionProfiler(found.model, seed=question.seed).analyze(
        metric=found.metric,
        tolerance=found.needed("tolerance", "a metric"),
        formats=formats,
        progress=shown.stage,
    )
    return Answer(report=report, plan=PrecisionPlan.of(formats[0], dict(report.formats)))


def _profile(found: Target, question: Question, shown: Progress) -> Answer:
    profiler = PrecisionProfiler(found.model, loss_fn=found.loss_fn, recipes=question.recipes, seed=question.seed)
    report = profiler.analyze(
        found.needed("loader", "a profile (--no-data does without)") if question.data else None,
        max_batches=question.batches,
        verify=question.verify,
        time_layers=question.timed,
        resume=question.resume,
        progress=shown.stage,
    )
    if not question.data:
        return Answer(report=report, plan=None)
    budgets = {"budget": question.budget, "noise_budget": question.noise_budget}
    plan = report.plan(**budgets, by_role=question.by_role, recipes=report.recipes if question.emulate else None)
    return Answer(report=report.with_plan(plan, **budgets), plan=plan)
