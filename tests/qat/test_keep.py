"""What stays in FP32 is named, or read off a plan that raises it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError, PlanError
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.qat import prepare
from deepseek_mp.qat.keep import kept_names


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 2))


def test_a_plan_keeps_the_layers_that_it_raises():
    plan = PrecisionPlan.of("bf16", {"1.1": "fp32", "2": "tf32", "0": "row"})
    assert kept_names(model(), plan) == ["1.1", "2"]


def test_the_file_of_a_plan_does_as_the_plan(tmp_path):
    PrecisionPlan.of("bf16", {"1.1": "fp32"}).save(tmp_path / "plan.json")
    decisions = prepare(model(), torch.randn(2, 8), keep=tmp_path / "plan.json").decisions
    assert [decision.new for decision in decisions] == ["int8", "fp32", "int8"]


def test_a_plan_that_found_nothing_out_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="keep as a plan of the base fp32"):
        kept_names(model(), PrecisionPlan.of("fp32", {"0": "bf16"}))
    with pytest.raises(PlanError, match="matches no layer"):
        kept_names(model(), PrecisionPlan.of("bf16", {"head": "fp32"}))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(PlanError, match="a plan"):
        kept_names(model(), tmp_path / "other.json")


@pytest.mark.parametrize("keep", [["last"], "0", [None], 3])
def test_names_that_the_model_does_not_have_are_refused(keep):
    with pytest.raises(ConfigError, match="a list of names of the model's modules"):
        kept_names(model(), keep)


def test_names_that_come_from_an_iterator_are_kept():
    assert kept_names(model(), (name for name in ("0", "1"))) == ["0", "1"]


def test_a_name_that_is_no_list_is_shown_as_one():
    with pytest.raises(ConfigError, match=r"keep='1\.1'.*Pass \['1\.1'\]"):
        kept_names(model(), "1.1")


def test_where_no_name_is_near_those_of_the_model_are_shown():
    with pytest.raises(ConfigError, match=r"Change 'head'\. The model has '0', '1'"):
        kept_names(model(), ["head"])
    many = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(10)))
    with pytest.raises(ConfigError, match=r"'6', '7' and 2 more\."):
        kept_names(many, ["head"])
    with pytest.raises(ConfigError, match=r"The model has no modules in it\."):
        kept_names(torch.nn.Linear(1, 1), ["head"])


def test_nothing_is_kept_for_none():
    assert kept_names(model(), None) == kept_names(model(), ()) == []
    assert [decision.new for decision in prepare(model(), torch.randn(2, 8), keep=None).decisions] == ["int8"] * 3
