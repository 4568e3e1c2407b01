"""Plans: which rule wins, what is refused, and what a plan says of itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_mp.errors import PlanError
from deepseek_mp.precision import (
    FORMATS,
    GRANULARITIES,
    RECIPES,
    Decision,
    PrecisionPlan,
    Reason,
    Recipe,
    Role,
    Rule,
    ScaleRule,
)
from deepseek_mp.precision.recipe import OperandRecipe, RoleRecipe

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
PAGE = Path(__file__).parents[2] / "docs" / "precision.md"
FP32, BF16 = RECIPES["fp32"], RECIPES["bf16"]

rules = st.builds(Rule, pattern=st.text(), recipe=st.sampled_from([*RECIPES.values()]))
SIDE = OperandRecipe(format=FORMATS["fp8_e4m3"], granularity=GRANULARITIES["1x128"], rule=ScaleRule.CURRENT)
OWN = Recipe(name="own", **{role: RoleRecipe(left=SIDE, right=SIDE) for role in ("fprop", "dgrad", "wgrad")})
DECISION = Decision(layer="fc", old="fp32", new="bf16", reason=Reason.REQUESTED, evidence={"bf16_ms": 1.0})
FULL = PrecisionPlan(
    base=BF16,
    rules=(Rule(pattern="*.norm*", recipe=FP32), Rule(pattern="head", recipe=OWN)),
    memory_format="channels_last",
    decisions=(DECISION,),
)


# Which rule wins


def test_base_is_the_recipe_of_layers_that_no_rule_names() -> None:
    plan = PrecisionPlan.of("bf16", {"head": "fp32"})
    assert plan.recipe_for("body") == BF16
    assert plan.rule_for("body") is None
    assert plan.recipe_for("head") == FP32


def test_first_match_wins_in_every_order() -> None:
    found = Rule(pattern="layer4*", recipe=FP32), Rule(pattern="*conv1", recipe=BF16), Rule(pattern="*", recipe=OWN)
    for order in permutations(found):
        assert PrecisionPlan(base="fp16", rules=order).rule_for("layer4.0.conv1") is order[0]  # type: ignore[arg-type]


@quick
@given(rules=st.lists(rules, max_size=4), name=st.text("ab.*", max_size=5))
def test_rule_for_is_the_first_that_matches(rules: list[Rule], name: str) -> None:
    plan = PrecisionPlan(base=BF16, rules=tuple(rules))
    matching = [rule for rule in rules if rule.matches(name)]
    assert plan.rule_for(name) == (matching[0] if matching else None)
    assert plan.recipe_for(name) == (matching[0].recipe if matching else BF16)


def test_pins_come_first_and_in_their_order() -> None:
    plan = PrecisionPlan.of("bf16", {"head": "fp16"}).with_pins({"head": "fp32", "h*": "tf32"})
    assert [(rule.pattern, rule.recipe.name) for rule in plan.rules] == [
        ("head", "fp32"),
        ("h*", "tf32"),
        ("head", "fp16"),
    ]
    assert plan.recipe_for("head") == FP32


def test_pins_leave_the_old_plan_alone_and_drop_its_decisions() -> None:
    before = FULL.to_json()
    pinned = FULL.with_pins({"fc": OWN})
    assert pinned.decisions == ()
    assert (pinned.base, pinned.memory_format, pinned.rules[1:]) == (FULL.base, FULL.memory_format, FULL.rules)
    assert FULL.to_json() == before
    assert FULL.with_pins({}) == FULL


@pytest.mark.parametrize(
    ("pattern", "covered", "not_covered"),
    [
        ("layer4", ["layer4", "layer4.0", "layer4.0.conv1"], ["layer40", "layer4x.0", "my.layer4", "Layer4", ""]),
        ("layer4*", ["layer4", "layer40", "layer4.0.conv1"], ["my.layer4"]),
        ("layer4.0", ["layer4.0", "layer4.0.conv1"], ["layer4", "layer4.00", "layer4_0"]),
        ("*.norm*", ["a.norm", "a.b.norm1", "a.norm.weight", "a.normal.fc"], ["norm", "norm.weight", "a.my_norm"]),
        ("*norm*", ["norm", "a.norm1", "a.my_norm"], ["a.fc"]),
        ("layer?", ["layer1", "layer1.fc"], ["layer", "layer10"]),
        ("layer[12]", ["layer1", "layer2.fc"], ["layer3", "layer[12]"]),
        ("layer[!12]", ["layer3"], ["layer1"]),
        ("layer[", ["layer[", "layer[.fc"], ["layer1"]),
        ("*", ["", "a", "a.b"], []),
        ("", [""], ["a", "a.b"]),
        ("a.*.c", ["a.b.c", "a.b.b.c", "a.b.c.d"], ["a.c", "a.b"]),
    ],
)
def test_patterns_are_globs_over_the_name_and_its_ancestors(
    pattern: str, covered: list[str], not_covered: list[str]
) -> None:
    rule = Rule(pattern=pattern, recipe=FP32)
    assert [name for name in covered if not rule.matches(name)] == []
    assert [name for name in not_covered if rule.matches(name)] == []


@quick
@given(pattern=st.text("ab.*?[]!-\\", max_size=8), name=st.text("ab.[]", max_size=8), child=st.text("ab", min_size=1))
def test_a_covered_module_covers_what_it_contains(pattern: str, name: str, child: str) -> None:
    rule = Rule(pattern=pattern, recipe=FP32)
    if rule.matches(name) and name:
        assert rule.matches(f"{name}.{child}")


# What is refused


def test_check_names_accepts_layers_and_ancestors() -> None:
    plan = PrecisionPlan.of("bf16", {"layer4": "fp32", "*.conv?": "fp16", "fc": "fp32"})
    plan.check_names(iter(["layer4.0.conv1", "fc"]))
    PrecisionPlan.of("bf16").check_names([])


@pytest.mark.parametrize(
    ("pattern", "names", "message"),
    [
        (
            "layr4",
            ["layer4.0.conv1", "fc"],
            "rule 'layr4' -> fp32 matches no layer of this model. Allowed: a glob over 'layer4.0.conv1', 'fc'. "
            "Correct the pattern or remove the rule. Did you mean 'layer4'",
        ),
        (
            "zzz",
            [f"a{n}" for n in range(11)],
            "rule 'zzz' -> fp32 matches no layer of this model. Allowed: a glob over 'a0', 'a1', 'a2', 'a3', 'a4', "
            "'a5', 'a6', 'a7' and 3 more. Correct the pattern or remove the rule.",
        ),
        ("x", [], "Allowed: a glob over the layers of a model; this one has none. Correct"),
        ("HEAD", ["head", "heat"], "Did you mean 'head'?"),
    ],
)
def test_check_names_names_the_rule_and_what_is_near(pattern: str, names: list[str], message: str) -> None:
    plan = PrecisionPlan.of("bf16", {"*": "bf16", pattern: "fp32"} if names else {pattern: "fp32"})
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        plan.check_names(names)
    assert ".." not in str(caught.value)
    assert "?." not in str(caught.value)


@pytest.mark.parametrize("base", ["bf16", BF16])
def test_a_recipe_may_be_given_by_name(base: Any) -> None:
    assert PrecisionPlan(base=base) == PrecisionPlan.of("bf16")
    assert Rule(pattern="a", recipe=base) == Rule(pattern="a", recipe=BF16)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("base", "bf61", r"^unknown recipe 'bf61'\. Allowed: fp64, .* Did you mean 'bf16'"),
        ("base", None, r"^unknown recipe None\."),
        (
            "rules",
            {"head": "fp32"},
            r"^rules are \{'head': 'fp32'\}\. Allowed: a list or tuple of Rule\. Use PrecisionPlan\.of",
        ),
        ("rules", "head", r"^rules are 'head'\."),
        ("rules", None, r"^rules are None\."),
        ("rules", [("head", "fp32")], r"^rules are \[\('head', 'fp32'\)\]\."),
        ("memory_format", "nhwc", r"^memory_format is 'nhwc'\. Allowed: 'contiguous' or 'channels_last'\."),
        ("memory_format", ["contiguous"], r"^memory_format is \['contiguous'\]\."),
        ("memory_format", None, r"^memory_format is None\."),
        ("decisions", DECISION, r"^decisions are Decision\("),
        ("decisions", ["fc"], r"^decisions are \['fc'\]\. Allowed: a list or tuple of Decision\."),
    ],
)
def test_a_plan_refuses_what_it_cannot_hold(field: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PrecisionPlan(**{"base": BF16, field: value})


def test_lists_become_tuples() -> None:
    values: dict[str, Any] = {"rules": [*FULL.rules], "decisions": [DECISION]}
    assert replace(FULL, **values) == FULL


@pytest.mark.parametrize("pattern", [None, 4, b"head", ("head",), re.compile("head")])
def test_a_pattern_is_a_string(pattern: Any) -> None:
    with pytest.raises(PlanError, match=r"^rule pattern is .*\. Allowed: a value of type str\. Pass a glob over layer"):
        PrecisionPlan.of("bf16", {pattern: "fp32"})


@pytest.mark.parametrize("pin", ["head", [("head", "fp32")], ["head"], [], "", 3, {"head"}])
def test_pins_are_a_mapping(pin: Any) -> None:
    for make in (PrecisionPlan.of("bf16").with_pins, lambda pin: PrecisionPlan.of("bf16", pin)):
        with pytest.raises(PlanError, match=r"^pin is .*\. Allowed: a mapping of layer patterns to recipes\. Pass for"):
            make(pin)


def test_a_pin_names_a_recipe() -> None:
    with pytest.raises(PlanError, match=r"^unknown recipe 'pf32'\..* Did you mean .*'fp32'"):
        PrecisionPlan.of("bf16", {"head": "pf32"})


# What a plan says of itself


def test_formats_are_the_recipes_in_use() -> None:
    assert FULL.formats == {"bf16", "fp32", "own"}
    assert PrecisionPlan.of("bf16").formats == {"bf16"}


def test_text_is_short_and_names_everything() -> None:
    assert str(FULL).splitlines() == [
        "base bf16, channels_last",
        "*.norm* -> fp32",
        "head -> own",
        "fc fp32 -> bf16 (requested)",
    ]


def operand_variants(side: OperandRecipe) -> list[OperandRecipe]:
    """The operand with each of its fields changed."""
    return [
        replace(side, format=FORMATS["fp8_e5m2"]),
        replace(side, granularity=GRANULARITIES["row"]),
        replace(side, rule=ScaleRule.DELAYED),
        replace(side, power_of_two=True),
    ]


def own_variants() -> list[Recipe]:
    """The recipe `OWN` with each field of each operand of each product changed."""
    pairs = [replace(OWN.fprop, left=side) for side in operand_variants(SIDE)]
    pairs += [replace(OWN.fprop, right=side) for side in operand_variants(SIDE)]
    by_role = [
        *(replace(OWN, fprop=pair) for pair in pairs),
        *(replace(OWN, dgrad=pair) for pair in pairs),
        *(replace(OWN, wgrad=pair) for pair in pairs),
    ]
    return [*by_role, replace(OWN, name="bf16")]


def test_digest_reacts_to_every_field_that_acts() -> None:
    first, second = FULL.rules
    variants = [
        FULL,
        replace(FULL, base=FP32),
        replace(FULL, memory_format="contiguous"),
        replace(FULL, rules=()),
        replace(FULL, rules=(first,)),
        replace(FULL, rules=(second, first)),
        replace(FULL, rules=(first, second, second)),
        replace(FULL, rules=(replace(first, pattern="*.norm?"), second)),
        replace(FULL, rules=(replace(first, recipe=BF16), second)),
        *(replace(FULL, base=recipe) for recipe in own_variants()),
        *(replace(FULL, rules=(first, replace(second, recipe=recipe))) for recipe in own_variants()),
    ]
    assert len(variants) == 9 + 2 * 25
    assert len({plan.digest for plan in variants}) == len(variants)
    assert all(re.fullmatch("[0-9a-f]{16}", plan.digest) for plan in variants)


def test_digest_ignores_decisions() -> None:
    assert replace(FULL, decisions=()).digest == FULL.digest
    assert replace(FULL, decisions=(DECISION, DECISION)).digest == FULL.digest
    assert PrecisionPlan.from_json(FULL.to_json()).digest == FULL.digest


# What the documentation says


def fenced(language: str) -> str:
    """The first block of that language in docs/precision.md."""
    return PAGE.read_text(encoding="utf-8").partition(f"```{language}\n")[2].partition("```")[0]


def test_the_code_of_the_documentation_runs_and_gives_its_json() -> None:
    names: dict[str, Any] = {}
    exec(compile(fenced("python"), str(PAGE), "exec"), names)
    assert names["plan"].to_json() == json.loads(fenced("json"))


@pytest.mark.parametrize("word", [*Reason, *Role, *ScaleRule, *GRANULARITIES, *RECIPES])
def test_the_documentation_explains_every_word(word: str) -> None:
    assert f"`{word}`" in PAGE.read_text(encoding="utf-8")
