"""What a plan lowers is read off its decisions, and the work of a layer off its calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from deepseek_mp import PrecisionPlan, convert
from deepseek_mp.precision import Decision, Reason, find_recipe
from deepseek_mp.trainer.lowering import Lowered, by_saving, counted_flops, has_product, is_narrow, lowered_layers


class Mixed(nn.Module):
    """Layers of every kind that a plan treats differently."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.norm = nn.LayerNorm(16)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.fc2(self.fc1(self.norm(self.embedding(x)))))


def test_only_layers_that_multiply_and_are_narrow_count():
    model = Mixed()
    plan = convert(model, PrecisionPlan.of("bf16", {"head": "fp32"}), emulate=True)
    found = lowered_layers(model, plan, {"fc1": 7.0})
    assert [(layer.name, layer.recipe.name, layer.saved_ms, layer.flops) for layer in found] == [
        ("fc1", "bf16", None, 7.0), ("fc2", "bf16", None, 0.0)
    ]  # fmt: skip


def test_savings_are_those_of_the_evidence():
    model = Mixed()
    evidence = {
        "": {"fp32_ms": 9.0, "bf16_ms": 1.0},
        "fc1": {"fp32_ms": 2.0, "bf16_ms": 0.5, "bf16_channels_last_ms": 0.1},
        "fc2": {"fp32_ms": 1.0},
    }
    measured = [
        Decision(layer=name, old="fp32", new="bf16", reason=Reason.MEASURED_FASTEST, evidence=numbers)
        for name, numbers in evidence.items()
    ]
    plan = convert(model, replace(PrecisionPlan.of("bf16"), decisions=tuple(measured)), emulate=True)
    assert {layer.name: layer.saved_ms for layer in lowered_layers(model, plan, {})} == {
        "fc1": 1.5, "fc2": None, "head": None
    }  # fmt: skip


def test_the_best_savings_come_first_and_operations_where_nothing_was_measured():
    def layer(name, saved, flops):
        return Lowered(name=name, recipe=find_recipe("bf16"), saved_ms=saved, flops=flops)

    measured = [layer("a", -1.0, 9), layer("b", None, 8), layer("c", 2.0, 1), layer("d", None, 9)]
    assert [found.name for found in by_saving(measured)] == ["c", "d", "b", "a"]
    assert [found.name for found in by_saving([layer("a", None, 1), layer("b", None, 3)])] == ["b", "a"]


@pytest.mark.parametrize(
    ("module", "shape", "flops"),
    [
        (nn.Linear(4, 6), (2, 5, 4), 2 * 4 * 6 * 10),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 5, 7), 2 * 3 * 8 * 9 * 2 * 35),
        (nn.Conv2d(4, 8, 3, groups=4, stride=2), (1, 4, 7, 7), 2 * 8 * 9 * 9),
        (nn.ConvTranspose1d(3, 5, 2, stride=2), (2, 3, 10), 2 * 3 * 5 * 2 * 20),
        (nn.LSTM(4, 6, batch_first=True), (2, 5, 4), 2 * (4 * 6 * 4 + 4 * 6 * 6) * 10),
    ],
)
def test_operations_are_counted_by_the_call(module, shape, flops):
    model = nn.ModuleDict({"only": module, "norm": nn.LayerNorm(3)})
    with counted_flops(model) as counted:
        model["only"](torch.randn(shape))
    assert counted == {"only": flops}
    model["only"](torch.randn(shape))
    assert counted == {"only": flops}  # the hooks are gone


def test_a_layer_that_is_called_twice_counts_twice():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with counted_flops(model) as counted:
        model["a"](model["a"](torch.ones(1, 4)))
    assert counted == {"a": 64}


def test_which_recipes_are_narrow_and_which_modules_multiply():
    assert [is_narrow(find_recipe(name)) for name in ("fp32", "fp64", "tf32", "bf16", "row_gw_hp")] == [
        False, False, True, True, True
    ]  # fmt: skip
    modules = [nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU(), Mixed(), convert_linear()]
    assert [has_product(module) for module in modules] == [True, False, False, False, True]


def convert_linear():
    model = nn.Sequential(nn.Linear(2, 2))
    convert(model, PrecisionPlan.of("bf16"), emulate=True)
    return model[0]
