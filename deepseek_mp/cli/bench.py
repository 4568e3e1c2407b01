"""`deepseek-mp bench inference TARGET`: the forms of the user's model at several batch sizes, and the best of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deepseek_mp.cli.benching import Question, cards, sizes_of
from deepseek_mp.cli.common_options import Seed, read_names
from deepseek_mp.cli.output import check_writable, print_record, print_text, terminal_width
from deepseek_mp.records.lines import to_plain

bench = typer.Typer(help="Measure a model of your own.")


@bench.command()
def inference(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="file.py:function or module:function.")],
    *,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,64",
    budget: Annotated[float, typer.Option(help="Largest distance of the outputs to FP32.")] = 1e-3,
    metric: Annotated[str, typer.Option(help="That distance: kl (of logits) or relative.")] = "kl",
    formats: Annotated[str | None, typer.Option(help="Formats, as in bf16,fp16; fp32 is always shown.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Try compiled code too.")] = True,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing for each form.")] = 1.0,
    energy_seconds: Annotated[float, typer.Option(min=0, help="Of the energy counter; 30 can be trusted.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Write the numbers there, as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to measure, as in PyTorch: cpu, cuda:0.")] = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Time what TARGET returns in every form that it has, and say which is the fastest within the budget.

    TARGET is a function of your own, called without arguments, that returns (model, loader, loss_fn) or a mapping with
    these keys. The inputs are those of the loader's first batch, its samples repeated for larger sizes.
    """
    if out is not None:
        check_writable(out, "--out")
    question = Question(
        sizes=sizes_of(batch),
        budget=budget,
        metric=metric,
        formats=read_names(formats, "--formats"),
        compiled=compiled,
        seconds=seconds,
        energy_seconds=energy_seconds,
        device=device,
        seed=seed,
    )
    data = []
    try:
        for card in cards(target, question):
            data.append(card.to_json())
            if not as_json:
                print_text(card.text(terminal_width()) + "\n")
    finally:  # a larger batch may fail, after minutes for the others
        if out is not None and data:
            out.write_text(json.dumps(to_plain(data, "bench"), indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_record(data)
