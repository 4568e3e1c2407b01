"""The solver: near the exact optimum, within budgets, the same for every order of the items."""

from __future__ import annotations

import pytest

from deepseek_mp.errors import ConfigError
from deepseek_mp.precision.allocate import allocate
from deepseek_mp.precision.allocation import Budget, Choice, Item


def two_items() -> list[Item]:
    return [
        Item(name, (Choice("bf16", 2e-3, 0.0, 0.0), Choice("fp8", 2e-3 - saved, loss, 1e-3)))
        for name, saved, loss in (("small", 1e-4, 4e-4), ("large", 1e-3, 8e-4))
    ]


def test_the_choice_that_saves_most_is_taken_when_only_one_fits() -> None:
    allocation = allocate(two_items(), Budget(loss=1e-3, noise=1.0))
    assert [choice.name for choice in allocation.choices.values()] == ["bf16", "fp8"]
    assert allocation.totals.seconds == pytest.approx(3e-3)
    assert allocation.is_feasible


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^objective is 'time'\. Allowed: 'seconds', 'bytes'\."):
        allocate(two_items(), Budget(loss=1e-3, noise=1.0), "time")  # type: ignore[arg-type]
