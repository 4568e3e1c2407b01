"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from deepseek_mp.errors import ConfigError, explain

LARGEST_SEED = 2**63 - 1
"""What PyTorch's generators take, with room for those that count on from a seed."""

Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of weights, batches and samples.")]


def read_names(text: str | None, option: str) -> tuple[str, ...] | None:
    """Names with commas between them, None if the option was not given; `ConfigError` if there is none in it."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        passed = f"{option} {text!r}"
        raise ConfigError(explain(passed, "names with commas between them", "Name one, or leave the option out"))
    return names
