"""One decision per layer of an FP8 plan: reason, detail and implementations (plain plans: test_convert)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from deepseek_mp.nn import apply
from deepseek_mp.precision import Decision, PrecisionPlan, Reason

REFERENCE = {"quantise": "reference", "product": "reference"}


def model() -> nn.Module:
    return nn.ModuleDict({
        "embed": nn.Embedding(8, 128),
        "up": nn.Linear(128, 256),
        "attention": nn.MultiheadAttention(128, 2),
        "narrow": nn.Linear(256, 40),
        "head": nn.Linear(128, 256),
    })  # fmt: skip


def said(plan: PrecisionPlan) -> dict[str, Decision]:
    return {decision.layer: decision for decision in plan.decisions}


def test_every_layer_says_what_it_runs_in_and_why() -> None:
    decisions = said(apply(model(), "block", emulate=True))
    assert {name: (d.old, d.new, d.reason.value) for name, d in decisions.items()} == {
        "embed": ("fp32", "bf16", "no_kernel"),
        "up": ("fp32", "block", "emulated"),
        "attention": ("fp32", "bf16", "not_controllable"),
        "attention.out_proj": ("fp32", "bf16", "not_controllable"),
        "narrow": ("fp32", "bf16", "shape"),
        "head": ("fp32", "bf16", "output_layer"),
    }
    assert decisions["up"].evidence == REFERENCE
    assert [name for name, d in decisions.items() if d.evidence] == ["up"]
    assert decisions["narrow"].detail == "its weight is [40, 256] and block takes multiples of 128"
    assert "autocast's own list decides" in decisions["embed"].detail


def test_the_next_plan_knows_what_ran_before() -> None:
    made = model()
    apply(made, "fp8", emulate=True)
    decisions = said(apply(made, PrecisionPlan.of("fp32", {"up": "tensor"}), emulate=True))
    assert [decisions[name].old for name in ("up", "head", "embed", "attention")] == ["row", "bf16", "bf16", "bf16"]
    assert (decisions["up"].new, decisions["up"].reason) == ("tensor", Reason.EMULATED)
    assert (decisions["head"].new, decisions["head"].reason) == ("fp32", Reason.REQUESTED)


def test_fallbacks_of_an_earlier_plan_do_not_linger() -> None:
    made = model()
    plan = apply(made, "block", emulate=True)
    decisions = said(apply(made, replace(plan, base="bf16"), emulate=True))
    assert decisions["narrow"].reason is decisions["head"].reason is decisions["up"].reason is Reason.REQUESTED
    assert not decisions["up"].evidence


@pytest.mark.parametrize("reason", [Reason.MEASURED_FASTEST, Reason.MEASURED_SLOWER])
def test_a_measured_reason_keeps_its_numbers_beside_the_implementations(
    reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek_mp.nn.checks.check_devices", lambda *args, **kwargs: frozenset())  # all native
    timed = Decision(layer="up", old="bf16", new="row", reason=reason, detail="timed", evidence={"row_ms": 1.0})
    plan = replace(PrecisionPlan.of("bf16", {"up": "row"}), decisions=(timed,))
    kept = said(apply(model(), plan, kernels="reference"))["up"]
    assert (kept.reason, kept.detail, kept.old) == (reason, "timed", "fp32")
    assert kept.evidence == {"row_ms": 1.0, **REFERENCE}


def test_shared_weights_are_named_with_what_the_other_really_runs_in() -> None:
    made = nn.ModuleDict({"embed": nn.Embedding(128, 128), "mid": nn.Linear(128, 128), "head": nn.Linear(128, 128)})
    made["mid"].weight = made["head"].weight = made["embed"].weight
    decisions = said(apply(made, "block", emulate=True))
    assert "shares its weight with 'embed' (bf16), 'head' (bf16)" in decisions["mid"].detail
    assert "'mid' (block)" in decisions["head"].detail
    assert "the last layer that multiplies" in decisions["head"].detail
    assert torch.equal(made["mid"].weight, made["embed"].weight)
