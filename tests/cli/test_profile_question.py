"""Which options a metric has a use for."""

from pathlib import Path
from typing import Any

import pytest

from deepseek_mp.cli.profile_question import Question
from deepseek_mp.errors import ConfigError


def test_a_metric_takes_formats_a_device_and_a_seed() -> None:
    Question(recipes=("fp32",), device="cpu", seed=3).check_for_metric()


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"budget": 0.5}, "--budget"),
        ({"noise_budget": 0.5}, "--noise-budget"),
        ({"batches": 3}, "--batches"),
        ({"verify": 1}, "--verify"),
        ({"by_role": True}, "--by-role"),
        ({"emulate": True}, "--emulate"),
        ({"timed": False}, "--no-time"),
        ({"data": False}, "--no-data"),
        ({"resume": Path("part.json")}, "--resume"),
    ],
)
def test_what_a_metric_would_ignore_is_refused(asked: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} for a target with a metric"):
        Question(**asked).check_for_metric()
