"""The choices by layer as text and JSON."""

import json

from deepseek_mp.inference.layer_plan import LayerChoice, LayerPlan


def plan():
    def choice(layer, kind, saved, error, why):
        return LayerChoice(layer=layer, kind=kind, saved_us=saved, error=error, why=why)

    return LayerPlan(
        why="three of five",
        choices=(
            choice("blocks.0.up", "int8_weights", 2.0, 1e-5, "faster"),
            choice("blocks.1.up", "int8_weights", 3.0, 2e-5, "faster"),
            choice("blocks.0.down", None, 4.0, None, "too much"),
            choice("blocks.1.down", "fp8", 5.0, 1e-6, "faster"),
            choice("head", None, None, None, "not called"),
        ),
    )


def test_kinds_are_those_of_a_form():
    assert plan().kinds == (("blocks.0.up", "int8_weights"), ("blocks.1.up", "int8_weights"), ("blocks.1.down", "fp8"))


def test_layers_that_have_the_same_to_say_are_one_row_of_sums():
    sentence, head, _, *rows = plan().lines(100)
    assert sentence == "kinds by layer: three of five"
    assert head.replace(" ", "") == "layersnumberkindsavedµserrorwhy"
    assert [row.split() for row in rows] == [
        ["blocks.*.up", "2", "int8_weights", "5", "3e-05", "faster"],
        ["blocks.0.down", "1", "as", "the", "format", "4", "too", "much"],
        ["blocks.1.down", "1", "fp8", "5", "1e-06", "faster"],
        ["head", "1", "as", "the", "format", "not", "called"],
    ]
    assert LayerPlan(why="not tried").lines(40) == ["kinds by layer: not tried"]


def test_json_has_every_layer():
    read = json.loads(json.dumps(plan().to_json()))
    assert read["why"] == "three of five"
    assert read["choices"][3] == {
        "layer": "blocks.1.down", "kind": "fp8", "why": "faster", "saved_us": 5.0, "error": 1e-6,
    }  # fmt: skip
    assert len(read["choices"]) == 5
