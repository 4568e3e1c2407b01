"""What holds for every value of the vocabulary, and what importing it costs."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import deepseek_mp.precision as precision
from deepseek_mp.precision import FORMATS, GRANULARITIES, OPERANDS, RECIPES, Decision, PrecisionPlan, Reason, Role, Rule

PACKAGE = Path(precision.__file__).parents[1]
EVIDENCE = {"bf16_ms": 1.5, "sizes": [8, {"k": 16}]}
DECISION = Decision(layer="a", old="fp32", new="bf16", reason=Reason.PINNED, role=Role.DGRAD, evidence=EVIDENCE)
PLAN = PrecisionPlan(base=RECIPES["bf16"], rules=(Rule(pattern="a", recipe=RECIPES["fp32"]),), decisions=(DECISION,))
VALUES: list[Any] = [
    *FORMATS.values(),
    *GRANULARITIES.values(),
    RECIPES["bf16"].fprop.left,
    RECIPES["bf16"].fprop,
    *RECIPES.values(),
    PLAN.rules[0],
    DECISION,
    PLAN,
]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def pickled(protocol: int, value: Any) -> Any:
    return pickle.loads(pickle.dumps(value, protocol))


COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, replace, *(partial(pickled, p) for p in PROTOCOLS)]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_no_field_can_be_set_or_deleted(value: Any) -> None:
    for field in fields(value):
        with pytest.raises(FrozenInstanceError, match="cannot assign to field"):
            setattr(value, field.name, getattr(value, field.name))
        with pytest.raises(FrozenInstanceError, match="cannot delete field"):
            delattr(value, field.name)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field"):
        value.something_new = 1


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_copy_is_equal_and_hashes_alike(value: Any) -> None:
    for renew in COPIES:
        again = renew(value)
        assert again == value
        assert hash(again) == hash(value)
        assert type(again) is type(value)


@pytest.mark.parametrize("table", [FORMATS, GRANULARITIES, RECIPES, OPERANDS])
def test_tables_are_read_only(table: Any) -> None:
    with pytest.raises(TypeError, match="does not support item deletion"):
        del table["mine"]
    with pytest.raises(TypeError, match="does not support item assignment"):
        table["mine"] = None


def test_a_copied_plan_shares_nothing_that_can_change() -> None:
    for renew in COPIES:
        with pytest.raises(TypeError, match="read-only"):
            renew(PLAN).decisions[0].evidence["sizes"][1]["k"] = 32
    assert PLAN.to_json()["decisions"][0]["evidence"] == EVIDENCE


def test_public_names_exist() -> None:
    assert [name for name in precision.__all__ if not hasattr(precision, name)] == []


IMPORT = """
import importlib, pathlib, sys, types
package = types.ModuleType("deepseek_mp")  # stands in for the package, which imports more than its bottom layer
package.__path__ = [sys.argv[1]]
sys.modules["deepseek_mp"] = package
before = set(sys.modules)
importlib.import_module("deepseek_mp.errors")
for file in pathlib.Path(sys.argv[1], "precision").glob("*.py"):
    importlib.import_module(f"deepseek_mp.precision.{file.stem}".removesuffix(".__init__"))
imported = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(imported - sys.stdlib_module_names))
"""


def test_the_vocabulary_imports_no_torch() -> None:
    command = [sys.executable, "-I", "-c", IMPORT, str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - {"numpy"} == {"deepseek_mp"}
