"""Settings are flat, a plan among them is short, and only what differs is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_mp.precision import PrecisionPlan, find_recipe
from deepseek_mp.records import read_run
from deepseek_mp.report.settings import as_text, differing, read_plan, recipes_of, settings_of

Record = Callable[..., Path]
PLAN = PrecisionPlan.of("bf16", {"head": "fp32"})


def test_settings_are_dotted_names(record: Record) -> None:
    found = settings_of(read_run(record(plan=PLAN)))
    assert found["versions.torch"] == "2.13.0"
    assert found["config.seed"] == 0
    assert (found["plan.base"], found["plan.rules"]) == ("bf16", ["head -> fp32"])
    assert "device.notes" not in found


def test_a_plan_among_the_settings_is_short(record: Record) -> None:
    mine = replace(find_recipe("row"), name="mine")
    info = {"config": {"precision_mode": PrecisionPlan.of(mine).to_json(), "pin": {}}}
    found = settings_of(read_run(record(info=info)))
    assert found == {
        "config.precision_mode.base": "mine",
        "config.precision_mode.rules": [],
        "config.precision_mode.memory_format": "contiguous",
        "config.pin": None,
    }


def test_only_what_differs_is_told() -> None:
    one, other = {"a": 1, "b": [1, 2], "c": None}, {"a": 1, "b": [2, 1], "d": True}
    assert differing(one, other) == [
        ("b", [1, 2], [2, 1]), ("c", None, "(not recorded)"), ("d", "(not recorded)", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"), [(None, "none"), (True, "yes"), (False, "no"), ([1, "a"], "1, a"), ([], "none"), (0.5, "0.5")]
)
def test_values_in_words(value: object, text: str) -> None:
    assert as_text(value) == text


def test_plans_are_read_or_said_to_be_unreadable() -> None:
    assert read_plan(None) is None
    assert read_plan(PLAN.to_json()) == PLAN
    assert "record version 7" in str(read_plan(PLAN.to_json() | {"version": 7}))


def test_recipes_of_a_plan_are_known_beside_those_with_a_name(record: Record) -> None:
    mine = replace(find_recipe("row"), name="mine")
    known = recipes_of(read_run(record(plan=PrecisionPlan.of("bf16", {"head": mine}))))
    assert known["mine"] == mine
    assert known["block"] == find_recipe("block")
    assert "mine" not in recipes_of(read_run(record("other")))


def test_a_callback_that_one_run_lacks_is_one_setting(record: Record) -> None:
    def settings(name: str, **callbacks: object) -> dict[str, Any]:
        return settings_of(read_run(record(name, info={"callbacks": callbacks})))

    here = settings("here", Live={"budget": 1.0, "share": 0.5}, Stored={"every": 3, "limits": {"psi": 20.0}})
    there = settings("there", Live={"budget": 2.0, "share": 0.5})
    only = {"every": 3, "limits.psi": 20.0}
    assert differing(here, there) == [
        ("callbacks.Live.budget", 1.0, 2.0), ("callbacks.Stored", only, "(not recorded)")
    ]  # fmt: skip
    assert differing(there, here)[1] == ("callbacks.Stored", "(not recorded)", only)
