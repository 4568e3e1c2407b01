"""What `deepseek-mp bench inference` was asked, measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_mp.cli.target import load_target
from deepseek_mp.errors import ConfigError, LoaderError, explain
from deepseek_mp.inference import Card, optimize_for_inference
from deepseek_mp.inference.samples import inputs_of
from deepseek_mp.nn import call as calls
from deepseek_mp.trainer.position import check_loader
from deepseek_mp.trainer.progress import Progress
from deepseek_mp.trainer.setup import check_arguments, choose_device, seed_everything


@dataclass(frozen=True, kw_only=True)
class Question:
    """The options of the command."""

    sizes: tuple[int, ...]
    budget: float
    metric: str
    formats: tuple[str, ...] | None
    compiled: bool
    seconds: float
    energy_seconds: float
    device: str | None
    seed: int


def sizes_of(text: str) -> tuple[int, ...]:
    """Batch sizes as the user writes them, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(explain(f"--batch {text!r}", "whole numbers from 1, as in 1,8,64", "Pass some of these"))
    return tuple(dict.fromkeys(map(int, parts)))


def cards(target: str, question: Question) -> Iterator[Card]:
    """Call the user's function and measure the model that it returns, at one batch size after the other."""
    seed_everything(question.seed)
    found = load_target(target)
    check_arguments(found.model, None)
    device = choose_device(found.model, question.device)
    found.model.to(device)
    loader = found.needed("loader", "bench inference")
    check_loader(loader)
    first = next(iter(loader), None)
    if first is None:
        raise LoaderError(explain(f"a loader of {target} without batches", "one batch", "Let it give one"))
    call = calls.move(calls.parse_batch(first), device)
    for size in question.sizes:
        with Progress(None) as shown:
            card = optimize_for_inference(
                found.model,
                inputs_of(found.model, call, size),
                budget=question.budget,
                metric=question.metric,
                compile=question.compiled,
                formats=question.formats,
                seconds=question.seconds,
                energy_seconds=question.energy_seconds,
                progress=shown.stage,
            ).card
        yield card
