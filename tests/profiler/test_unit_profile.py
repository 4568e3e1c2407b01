"""Profiles of units as mappings."""

import json

import pytest

from deepseek_mp.precision import RECIPES
from deepseek_mp.profiler.unit_profile import UnitProfile, family_of


def profile(**values):
    return UnitProfile({"kind": "Linear", "recommended": "bf16", "fp16_loss": float("inf"), **values})


def test_it_is_a_mapping_that_does_not_change():
    losses = {"row": {"loss": 1.0}}
    made = profile(recipes=losses)
    losses["row"]["loss"] = 2.0
    assert made["recipes"]["row"]["loss"] == 1.0
    with pytest.raises(TypeError, match="does not support item assignment"):
        made["kind"] = "other"
    assert made.with_values(kind="other")["kind"] == "other"
    assert made["kind"] == "Linear"
    assert "fp16_loss=inf" in repr(made)


def test_an_infinite_loss_survives_json():
    made = profile(recipes={"row": {"loss": float("inf"), "list": [1, 2.5, None, "text"]}})
    again = UnitProfile.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert dict(again) == dict(made)


def test_every_recipe_has_its_family():
    assert family_of("nvfp4") == "fp4"
    assert family_of("fp32") is None
    assert {family_of(name) for name in RECIPES} == {None, "tf32", "bf16", "fp16", "fp8", "fp4"}
