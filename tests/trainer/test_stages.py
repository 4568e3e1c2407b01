"""Stages lower the best layers first, in plans that give every layer exactly what was meant."""

from __future__ import annotations

import pytest
from torch import nn

from deepseek_mp import PrecisionPlan, convert
from deepseek_mp.errors import ConfigError
from deepseek_mp.precision import find_recipe
from deepseek_mp.trainer.lowering import Lowered
from deepseek_mp.trainer.stages import Stage, baseline_stage, check_stages, partial_plan, share_name, stages_of

PLAN = PrecisionPlan.of("bf16")


def lowered(*flops, recipe="bf16"):
    return [Lowered(name=str(i), recipe=find_recipe(recipe), saved_ms=None, flops=f) for i, f in enumerate(flops)]


def model(layers=4):
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def names(stages: list[Stage]) -> dict[str, tuple[str, ...]]:
    return {stage.name: stage.lowered for stage in stages}


def test_the_half_with_most_work_then_all():
    stages = stages_of(model(), PLAN, lowered(1, 9, 5, 7), (0.5, 1.0))
    assert names(stages) == {"half": ("1", "3"), "all": ("0", "1", "2", "3")}
    assert stages[1].plan is PLAN
    assert stages[0].plan.base.name == "fp32"
    assert {name: stages[0].plan.recipe_for(name).name for name in "0123"} == {
        "0": "fp32", "1": "bf16", "2": "fp32", "3": "bf16"
    }  # fmt: skip


def test_shares_that_lower_nothing_more_are_left_out():
    assert list(names(stages_of(model(), PLAN, lowered(1, 2, 3, 4), (0.2, 0.25, 0.3, 0.5)))) == ["20pct", "30pct"]
    assert list(names(stages_of(model(1), PLAN, lowered(1), (0.5, 1.0)))) == ["all"]


def test_a_setting_of_the_process_cannot_be_mixed():
    assert list(names(stages_of(model(), PrecisionPlan.of("tf32"), lowered(1, 2, recipe="tf32"), (0.5, 1)))) == ["all"]


def test_a_partial_plan_fits_a_model_with_layers_inside_layers_and_strange_names():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b[0]": nn.Linear(4, 4), "b0": nn.Linear(4, 4)})
    net["a"].inner = nn.Linear(4, 4)
    chosen = [Lowered(name=name, recipe=find_recipe("bf16"), saved_ms=None, flops=1) for name in ("a", "b[0]")]
    plan = partial_plan(["a", "a.inner", "b[0]", "b0"], PLAN, chosen)
    resolved = convert(net, plan, emulate=True)
    new = {decision.layer: decision.new for decision in resolved.decisions}
    assert new == {"a": "bf16", "a.inner": "fp32", "b[0]": "bf16", "b0": "fp32"}


def test_a_model_that_is_one_layer():
    net = nn.Linear(4, 4)
    plan = partial_plan([""], PLAN, [Lowered(name="", recipe=find_recipe("bf16"), saved_ms=None, flops=1)])
    assert [d.new for d in convert(net, plan, emulate=True).decisions] == ["bf16"]


def test_the_baseline_is_fp32_in_the_model_s_memory_format():
    assert baseline_stage(model()).plan == PrecisionPlan.of("fp32")


@pytest.mark.parametrize("stages", [None, (1.0,), [0.25, 0.5, 1], {"mlp": "bf16"}])
def test_stages_that_are_fine(stages):
    check_stages(stages)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "rising shares"), ((0.5, 0.5), "rising shares"), ((1.0, 0.5), "rising shares"), ((0.0, 1.0), "above 0"),
        ((1.5,), "at most 1"), ("half", "rising shares"), (("half",), "rising shares"), (0.5, "rising shares"),
        ({}, "no stage"), ({"fp32": "bf16"}, "baseline's"), ({"../x": "bf16"}, "the name '../x'"),
        ({"": "bf16"}, "the name ''"), ({3: "bf16"}, "the name 3"),
    ],
)  # fmt: skip
def test_stages_that_are_not(stages, message):
    with pytest.raises(ConfigError, match=message):
        check_stages(stages)


def test_names_of_shares():
    assert [share_name(share) for share in (0.5, 1, 0.25, 0.125)] == ["half", "all", "25pct", "12.5pct"]
