"""What layers may run in: by device, plan and settings."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from deepseek_mp import AdaptiveSettings, MixedPrecisionTrainer, PrecisionPlan
from deepseek_mp.profiler.layer_times import LayerCosts
from deepseek_mp.trainer import adaptive_choices
from deepseek_mp.trainer.adaptive_choices import layers_to_control, measured_costs, recipes_asked

BATCH = torch.randn(16, 32), torch.randint(0, 8, (16,))


def trainer(precision="bf16", native=(), emulate=True, model=None, **values):
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    made = MixedPrecisionTrainer(model, precision, emulate=emulate, progress=False, **values)
    made.step(BATCH)
    known = made.capabilities
    made.capabilities = replace(known, matmul_formats=known.matmul_formats | set(native))
    return made


def asked(made, **settings):
    return [recipe.name for recipe in recipes_asked(made, AdaptiveSettings(**settings))]


def test_by_default_fp8_and_what_is_above_a_bf16_region():
    assert asked(trainer()) == ["fp32", "tensor", "row", "block"]


def test_tf32_is_above_where_the_device_has_it_and_nothing_else_needs_fp32():
    assert asked(trainer(native={"tf32"}))[0] == "tf32"
    assert asked(trainer(native={"tf32"}, pin={"4": "fp32"}))[0] == "fp32"


def test_of_fp32_and_tf32_there_is_one():
    assert asked(trainer(native={"tf32"}), recipes=("fp32", "tf32", "row")) == ["tf32", "row"]
    assert asked(trainer(), recipes=("fp32", "tf32", "row")) == ["fp32", "row"]
    assert asked(trainer(native={"tf32"}), recipes=("fp32", "row")) == ["fp32", "row"]


@pytest.mark.parametrize("region", ["fp32"])
def test_nothing_is_above_an_fp32_region_and_plain_recipes_may_be_below(region):
    assert asked(trainer(region), recipes=("fp32", "tf32", "bf16", "row")) == ["bf16", "row"]


def test_fp16_is_asked_for_by_name_only():
    assert "fp16" not in asked(trainer(native={"fp16"}))
    assert asked(trainer(native={"fp16"}), recipes=("fp16", "row")) == ["fp16", "row"]


def layers(made, settings):
    return layers_to_control(made, settings, lambda recipes: measured_costs(made, settings, BATCH, recipes))


def control(made, **settings):
    found, why = layers(made, AdaptiveSettings(**settings))
    return {name: layer.unit.recipes for name, layer in found.items()}, why


def test_layers_that_take_no_fp8_can_still_go_up():
    found, why = control(trainer(), recipes=("fp32", "row"))
    assert found == {"0": ("fp32", "row"), "2": ("fp32", "row"), "4": ("fp32",)}
    assert why == ""


def test_frozen_weights_in_bf16_are_read_in_a_bf16_region_alone():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    model[0].requires_grad_(False).bfloat16()
    found, _ = control(trainer(model=model), recipes=("fp32", "row"))
    assert found == {"0": ("row",), "2": ("fp32",)}


def test_only_raising_is_something_to_decide_if_it_was_asked_for():
    assert control(trainer(), recipes=("fp32",))[0] == {"0": ("fp32",), "2": ("fp32",), "4": ("fp32",)}


NAMED = "every layer is pinned or named by the plan"


@pytest.mark.parametrize("settings", [{}, {"recipes": ("fp32",)}, {"recipes": ("fp32", "row")}, {"recipes": ("row",)}])
def test_where_the_user_decided_on_every_layer_it_says_so(settings):
    assert control(trainer(pin={"*": "bf16"}), **settings) == ({}, NAMED)
    assert control(trainer(PrecisionPlan.of("bf16", {"*": "bf16"})), **settings) == ({}, NAMED)
    assert (
        control(trainer(PrecisionPlan.of("bf16", {"0": "fp32", "2": "row"}), pin={"4": "bf16"}), **settings)[1] == NAMED
    )


@pytest.mark.parametrize("settings", [{}, {"recipes": ("fp32",)}])
def test_a_model_that_multiplies_nothing_says_so(settings):
    made = trainer(model=nn.Sequential(nn.LayerNorm(32)))
    assert control(made, **settings) == ({}, "no layer multiplies matrices")


@pytest.mark.parametrize(("region", "recipes"), [("bf16", ("bf16",)), ("fp32", ("fp32",)), ("fp32", ("tf32", "fp32"))])
def test_the_region_alone_is_nothing_to_choose_from(region, recipes):
    why = control(trainer(region), recipes=recipes)[1]
    assert why == f"nothing beside the region, {region}, was asked for"


def test_recipes_that_the_device_does_not_have_are_named():
    why = control(trainer(emulate=False), recipes=("bf16", "row"))[1]
    assert why == "this device multiplies in none of bf16, row"


@pytest.mark.parametrize("emulate", [True, False])
def test_after_auto_it_says_how_a_recipe_is_emulated(monkeypatch, emulate):
    made = trainer(emulate=emulate)
    monkeypatch.setattr(made, "config", replace(made.config, precision_mode="auto"))
    why = control(made)[1]
    assert why.startswith("this device has no FP8 recipe of its own that 'auto' could time")
    assert why.endswith("; name recipes= to emulate one") == emulate


def test_the_numbers_of_inputs_are_counted():
    found, _ = layers(trainer(), AdaptiveSettings(recipes=("row",)))
    assert {name: layer.unit.inputs for name, layer in found.items()} == {"0": 16 * 32, "2": 16 * 64}


@pytest.mark.parametrize(("how", "blocks"), [("regional", ["0", "0", "1", "1"]), (False, [""] * 4)])
def test_layers_know_the_block_that_they_are_compiled_in(how, blocks):
    block = [nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(2)]
    made = trainer(model=nn.Sequential(*block, nn.Linear(32, 8)))
    made.config = replace(made.config, compile=how)
    found, _ = layers(made, AdaptiveSettings(recipes=("row",)))
    assert [layer.unit.block for layer in found.values()][:4] == blocks


def test_for_memory_a_recipe_that_is_slower_is_a_choice(monkeypatch):
    slow = {"fp32": 4.0, "bf16": 1.0, "row": 2.0}
    costs = LayerCosts(macs={"0": 1}, milliseconds={"0": slow, "2": slow}, inputs={"0": 512, "2": 1024})
    monkeypatch.setattr(adaptive_choices, "layer_costs", lambda *_, **__: costs)
    monkeypatch.setattr(adaptive_choices, "_is_timed", lambda *_: True)
    made = trainer()
    assert control(made, recipes=("row",))[1].startswith("no layer is 5% faster in row than in bf16: ")
    assert control(made, recipes=("row",), objective="memory")[0] == {"0": ("row",), "2": ("row",)}
