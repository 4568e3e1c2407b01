"""`deepseek-mp train TARGET`: train the model that a function of the user returns, and say what was done and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepseek_mp.cli.common_options import Seed
from deepseek_mp.cli.target import load_target
from deepseek_mp.cli.training import fit
from deepseek_mp.cli.training_options import Extent, read_memory, read_pins, read_precision, unused
from deepseek_mp.trainer import MixedPrecisionTrainer
from deepseek_mp.trainer.setup import seed_everything


def train(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="file.py:function or module:function.")],
    *,
    precision: Annotated[str, typer.Option(help="auto, a format, a recipe, or a plan as JSON.")] = "auto",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the whole run; 1 without --steps.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Applied steps of the whole run.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="For records and checkpoints; else a new one in runs/.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run directory to go on in.")] = None,
    pin: Annotated[list[str] | None, typer.Option(metavar="PATTERN=RECIPE", help="Layers and their recipe.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model and its loss.")] = False,
    emulate: Annotated[bool, typer.Option("--emulate", help="Allow formats that the device lacks.")] = False,
    adapt: Annotated[bool | None, typer.Option(help="Lower and raise layers on the way; by default with auto.")] = None,
    memory: Annotated[str | None, typer.Option(help="GiB that a step may hold, or auto: what the device has.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to train, as in PyTorch: cpu, cuda:0.")] = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Train what TARGET returns: the model, a loader and a loss, and if it likes an optimizer and a val_loader.

    TARGET is a function of your own, called without arguments, that returns (model, loader, loss_fn) or a mapping with
    these keys. Ctrl-C stops after the step under way, with a checkpoint.
    """
    extent, plan, pins = Extent.of(epochs, steps), read_precision(precision), read_pins(pin or ())
    budget = read_memory(memory)
    seed_everything(seed)
    found = load_target(target)
    found.needed("loader", "training")
    where = run_dir or resume or unused(target)
    trainer = MixedPrecisionTrainer(
        found.model,
        plan,
        loss_fn=found.loss_fn,
        optimizer=found.optimizer,
        pin=pins,
        emulate=emulate,
        adapt=adapt,
        compile=compiled,
        memory=budget,
        device=device,
        seed=seed,
        run_dir=where,
    )
    fit(trainer, found, extent, resume=resume, where=where).deliver(as_json=as_json)
