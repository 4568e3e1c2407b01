"""Settings of the statistics: what is refused, and that the defaults are not."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_mp.errors import ConfigError, FormatError
from deepseek_mp.monitor import Sampling
from deepseek_mp.monitor.sampling import MOST_ROWS


def test_defaults_and_formats_of_every_kind() -> None:
    assert Sampling().rows <= MOST_ROWS
    chosen = Sampling(formats=["int8", "fp4_e2m1", "mx", "fp8", "block"])  # type: ignore[arg-type]
    assert chosen.formats == ("int8", "fp4_e2m1", "mx", "fp8", "block")
    assert Sampling(formats=()).formats == ()
    hash(chosen)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("every", 0, "whole number from 1"),
        ("every", True, "whole number from 1"),
        ("units", 1.5, "whole number from 1"),
        ("rows", 257, "whole number from 1 to 256"),
        ("decay", 1.0, "from 0 and below 1"),
        ("decay", "long", "from 0 and below 1"),
        ("seed", None, "a whole number"),
    ],
)
def test_wrong_settings(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed):
        Sampling(**{name: value})


def test_a_mistyped_format_is_named_with_a_near_one() -> None:
    with pytest.raises(FormatError, match=r"fp8_e4m4.*Did you mean.*fp8_e4m3"):
        Sampling(formats=("bf16", "fp8_e4m4"))
    with pytest.raises(FormatError, match="'e8m0'"):  # of scales only
        Sampling(formats=("e8m0",))
