"""The choices at the end of a run, role by role, and those that changed on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from deepseek_mp.precision import Decision, PrecisionPlan, Reason, Role
from deepseek_mp.records import read_run
from deepseek_mp.report.layers import LayerHistory, read_layers

Record = Callable[..., Path]


def decision(
    layer: str, new: str, *, old: str = "fp32", role: Role | None = None, reason: str = "requested"
) -> Decision:
    return Decision(layer=layer, old=old, new=new, role=role, reason=Reason(reason))


def layers_of(path: Path) -> LayerHistory:
    return read_layers(read_run(path))


def test_a_role_of_its_own_splits_a_layer(record: Record) -> None:
    path = record(
        decisions=[(0, decision("a", "bf16")), (4, decision("a", "fp32", role=Role.WGRAD)), (0, decision("b", "bf16"))]
    )
    layers = layers_of(path)
    assert [(c.layer, c.role, c.new, c.step) for c in layers.in_force] == [
        ("a", "fprop", "bf16", 0), ("a", "dgrad", "bf16", 0), ("a", "wgrad", "fp32", 4), ("b", None, "bf16", 0),
    ]  # fmt: skip
    assert layers.recipes()["a"] == {"fprop": "bf16", "dgrad": "bf16", "wgrad": "fp32"}
    assert [(c.layer, c.role, c.old, c.new, c.step) for c in layers.changes] == [("a", "wgrad", "bf16", "fp32", 4)]


def test_three_equal_roles_are_one_choice_again(record: Record) -> None:
    given = [(0, decision("a", "bf16")), (2, decision("a", "fp32", role=Role.WGRAD)), (5, decision("a", "block"))]
    layers = layers_of(record(decisions=given))
    assert [(c.role, c.new, c.step) for c in layers.in_force] == [(None, "block", 5)]
    assert [c.step for c in layers.changes] == [2, 5]


def test_a_resumed_run_that_repeats_its_plan_changed_nothing(record: Record) -> None:
    first = decision("a", "bf16", reason="measured_fastest")
    record(decisions=[(0, first)])
    path = record(losses=(1.0,), after=3, decisions=[(3, replace(first, reason=Reason.RESUMED, old="fp32"))])
    layers = layers_of(path)
    assert [(c.reason, c.step) for c in layers.in_force] == [("measured_fastest", 0)]
    assert layers.changes == ()


def test_the_reason_is_the_last_one_also_where_the_recipe_stays(record: Record) -> None:
    path = record(decisions=[(0, decision("a", "bf16")), (2, decision("a", "bf16", old="bf16", reason="pinned"))])
    assert [(c.reason, c.old, c.step) for c in layers_of(path).in_force] == [("pinned", "fp32", 0)]


def test_saturation_is_an_event_and_no_choice(record: Record) -> None:
    event = decision("a", "delayed", old="delayed", role=Role.DGRAD, reason="saturated")
    layers = layers_of(record(decisions=[(0, decision("a", "delayed")), (7, event), (9, event)]))
    assert [c.role for c in layers.in_force] == [None]
    assert [c.step for c in layers.saturated] == [7, 9]


def test_what_live_precision_says_of_the_model_is_no_choice(record: Record) -> None:
    off = Decision(layer="", old="bf16", new="bf16", reason=Reason.ADAPT_OFF, detail="no FP8 here")
    compared, again = (
        replace(decision("", "bf16", old="bf16", reason="compared"), evidence={"budget_scale": scale})
        for scale in (0.5, 0.625)
    )
    layers = layers_of(
        record(decisions=[(0, decision("", "bf16", reason="measured_fastest")), (0, off), (9, compared), (18, again)])
    )
    assert [c.reason for c in layers.in_force] == ["measured_fastest"]
    assert layers.adapt_off == ("no FP8 here",)
    assert [c.step for c in layers.compared] == [9, 18]
    assert layers.budget_scale == 0.625
    assert layers_of(record("other")).budget_scale is None


def test_how_weights_are_stored_is_no_choice(record: Record) -> None:
    stored = {**decision("a.weight", "bf16_sr").to_json(), "kind": "storage", "reason": "noise_small"}
    layers = layers_of(record(decisions=[(0, decision("a", "bf16")), (4, stored), (8, {**stored, "new": "fp32"})]))
    assert [c.layer for c in layers.in_force] == ["a"]
    assert layers.changes == ()
    assert [(c.layer, c.new, c.step) for c in layers.storage] == [("a.weight", "fp32", 8)]


def test_layers_that_the_plan_in_force_does_not_have_are_gone(record: Record) -> None:
    plan = replace(PrecisionPlan.of("bf16"), decisions=(decision("a", "bf16"),))
    given = [
        (0, decision("", "fp32", reason="measured_slower")),
        (0, decision("a", "fp32")),
        (5, decision("a", "bf16")),
    ]
    layers = layers_of(record(plan=plan, decisions=given))
    assert [c.layer for c in layers.in_force] == ["a"]
    without = layers_of(record("other", plan=replace(plan, decisions=()), decisions=given))
    assert [c.layer for c in without.in_force] == ["", "a"]


def test_what_a_later_release_may_write_is_kept_as_text(record: Record) -> None:
    path = record()
    line = '{"attempt": 1, "step": 0, "layer": "a", "new": "fp6", "reason": "astrology", "evidence": 3}\n'
    (path / "decisions.jsonl").write_text(line)
    choice = layers_of(path).in_force[0]
    assert (choice.new, choice.reason, choice.old, choice.evidence) == ("fp6", "astrology", "", {})
    assert choice.to_json()["layer"] == "a"
