"""Plans as JSON: what is written, and that anything else is refused with one clear error."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_mp.errors import ConfigError, PlanError
from deepseek_mp.precision import (
    FORMATS,
    GRANULARITIES,
    RECIPES,
    Decision,
    PrecisionPlan,
    Reason,
    Recipe,
    Role,
    Rounding,
    Rule,
    ScaleRule,
)
from deepseek_mp.precision.recipe import OperandRecipe, RoleRecipe

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
thorough = settings(quick, max_examples=200)

operands = st.builds(
    OperandRecipe,
    format=st.sampled_from([*FORMATS.values()]),
    granularity=st.sampled_from([*GRANULARITIES.values()]),
    rule=st.sampled_from(ScaleRule),
    power_of_two=st.booleans(),
) | st.builds(
    OperandRecipe,
    format=st.sampled_from([*FORMATS.values()]),
    rule=st.just(ScaleRule.CURRENT),
    rounding=st.sampled_from(Rounding),
)
products = st.builds(RoleRecipe, left=operands, right=operands)
own_recipes = st.builds(Recipe, name=st.text(min_size=1), fprop=products, dgrad=products, wgrad=products)
recipes = st.sampled_from([*RECIPES.values()]) | own_recipes
rules = st.builds(Rule, pattern=st.text(), recipe=recipes)
decisions = st.builds(
    Decision,
    layer=st.text(),
    old=st.text(),
    new=st.text(),
    reason=st.sampled_from(Reason),
    role=st.none() | st.sampled_from(Role),
    detail=st.text(),
    evidence=st.dictionaries(st.text(), st.integers() | st.lists(st.booleans()), max_size=2),
)
plans = st.builds(
    PrecisionPlan,
    base=recipes,
    rules=st.lists(rules, max_size=3),
    memory_format=st.sampled_from(["contiguous", "channels_last"]),
    decisions=st.lists(decisions, max_size=2),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["bf16", "row", "pinned"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)

SIDE = OperandRecipe(format=FORMATS["fp8_e4m3"], granularity=GRANULARITIES["1x128"], rule=ScaleRule.CURRENT)
OWN = Recipe(name="own", **{role: RoleRecipe(left=SIDE, right=SIDE) for role in ("fprop", "dgrad", "wgrad")})
DECISION = Decision(layer="fc", old="fp32", new="bf16", reason=Reason.REQUESTED, evidence={"bf16_ms": 1.0})
FULL = PrecisionPlan(
    base=RECIPES["bf16"],
    rules=(Rule(pattern="*.norm*", recipe=RECIPES["fp32"]), Rule(pattern="head", recipe=OWN)),
    memory_format="channels_last",
    decisions=(DECISION,),
)


@quick
@given(plan=plans)
def test_json_round_trip(plan: PrecisionPlan) -> None:
    again = PrecisionPlan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False)))
    assert again == plan
    assert again.digest == plan.digest


@pytest.mark.parametrize("name", RECIPES)
def test_known_recipes_are_written_by_name(name: str) -> None:
    data = PrecisionPlan.of(name, {"head": name}).to_json()
    assert data["base"] == data["rules"][0]["recipe"] == name
    assert PrecisionPlan.from_json(data).base is RECIPES[name]


def test_a_recipe_that_borrows_a_known_name_is_written_in_full() -> None:
    plan = PrecisionPlan(base=replace(OWN, name="bf16"))
    assert PrecisionPlan.from_json(plan.to_json()) == plan != PrecisionPlan.of("bf16")


@pytest.mark.parametrize("as_path", [str, Path])
def test_save_and_load(as_path: type, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    FULL.save(as_path(path))
    assert PrecisionPlan.load(as_path(path)) == FULL
    assert path.read_bytes().isascii()


@pytest.mark.parametrize("version", [2, 0, None, "1", 1.0, True, [1]])
def test_another_version_is_refused_before_anything_else(version: object) -> None:
    data = {"version": version, "written_by": "a later release"}
    shown = re.escape(f"plan of record version {version!r}. Allowed: version 1. Read it with the release")
    with pytest.raises(PlanError, match=f"^{shown}"):
        PrecisionPlan.from_json(data)


@pytest.mark.parametrize("data", [None, [], [1], "plan", 3, 1.5, True])
def test_a_plan_in_json_is_an_object(data: object) -> None:
    with pytest.raises(PlanError, match=r"^a plan is .*\. Allowed: an object with the fields \['version', 'base'"):
        PrecisionPlan.from_json(data)


@pytest.mark.parametrize("field", [field for field in FULL.to_json() if field != "version"])
def test_a_missing_field_is_refused(field: str) -> None:
    data = FULL.to_json()
    del data[field]
    with pytest.raises(PlanError, match=rf"^a plan has the fields \[[^]]*\]\. Allowed: .*'{field}'"):
        PrecisionPlan.from_json(data)


def test_an_unknown_field_is_refused_since_it_would_be_ignored() -> None:
    with pytest.raises(PlanError, match=r"^a plan has the fields \[.*'pin'.*\]\. Allowed: an object with the fields"):
        PrecisionPlan.from_json({**FULL.to_json(), "pin": {"head": "fp32"}})


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


def refuse_or_round_trip(data: object) -> None:
    try:
        plan = PrecisionPlan.from_json(data)
    except ConfigError as error:
        message = str(error)
    else:
        message = "read. Allowed: itself." if PrecisionPlan.from_json(plan.to_json()) == plan else "not read whole"
    assert re.fullmatch(r".+\. Allowed: .+[.?]", message, re.DOTALL)


@thorough
@given(data=st.data())
def test_a_damaged_plan_is_refused_or_read_whole(data: st.DataObject) -> None:
    plan = copy.deepcopy(FULL.to_json())
    container, key = data.draw(st.sampled_from(places(plan)))
    if isinstance(container, dict) and data.draw(st.booleans()):
        del container[key]
        container.update(data.draw(st.dictionaries(st.text(), json_values, max_size=1)))
    else:
        container[key] = data.draw(json_values)
    refuse_or_round_trip(plan)


@quick
@given(data=json_values | st.fixed_dictionaries({**dict.fromkeys(FULL.to_json(), json_values), "version": st.just(1)}))
def test_any_json_is_refused_or_read_whole(data: object) -> None:
    refuse_or_round_trip(data)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b'{"version": 1,}', b"\xff\xfe\x00", b"[" * 100_000, b"9" * 5_000, b"\x00"],
    ids=["empty", "cut", "text", "comma", "binary", "deep", "long number", "nul"],
)
def test_a_file_that_is_not_json_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(
        PlanError, match=r"plan\.json is not JSON \(.*\)\. Allowed: a plan file\. Save the plan again\.$"
    ):
        PrecisionPlan.load(path)


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_cut_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    FULL.save(path)
    path.write_bytes(path.read_bytes()[: -cut - 1])
    with pytest.raises(PlanError, match=r"is not JSON"):
        PrecisionPlan.load(path)


def test_a_file_that_does_not_exist_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-plan"):
        PrecisionPlan.load(tmp_path / "no-plan.json")
