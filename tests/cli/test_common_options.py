"""A seed that no generator takes, and a list of names without a name, are bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek_mp.cli.common_options import LARGEST_SEED, read_names
from deepseek_mp.errors import ConfigError


def test_names_with_commas_between_them() -> None:
    assert read_names(None, "--recipes") is None
    assert read_names("bf16, row,", "--recipes") == ("bf16", "row")
    with pytest.raises(ConfigError, match=r"--recipes ' ,'\. Allowed: names with commas between them\. Name one"):
        read_names(" ,", "--recipes")


def test_generators_take_the_largest_seed() -> None:
    torch.Generator().manual_seed(LARGEST_SEED)


@pytest.mark.parametrize(
    "command",
    [["train", "net.py:job"], ["profile", "net.py:job"], ["bench", "inference", "net.py:job"], ["demo", "--quick"]],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("seed", ["-1", str(LARGEST_SEED + 1)])
def test_other_seeds_are_one_line(
    net: Path, refused: Callable[[list[str]], str], command: list[str], seed: str
) -> None:
    assert "Invalid value for '--seed'" in refused([*command, "--seed", seed])
