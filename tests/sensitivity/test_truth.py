"""The loss with single units in a recipe."""

import pytest
import torch
from torch import nn

from deepseek_mp.precision import RECIPES
from deepseek_mp.sensitivity.outputs import largest_of, output_in
from deepseek_mp.sensitivity.truth import losses_in, outputs_in


def test_a_unit_gives_what_the_recipe_would_and_afterwards_what_it_gave():
    layer, x = nn.Linear(16, 8), torch.randn(2, 3, 16)
    before = layer(x)
    with outputs_in({layer: RECIPES["nvfp4"]}):
        made = layer(x)
    assert torch.equal(made.view(6, 8), output_in(layer, x.view(6, 16), RECIPES["nvfp4"], largest_of(x)))
    assert torch.equal(layer(x), before)
    assert not layer._forward_hooks


def test_changes_are_those_of_the_named_units_only():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    cases = {"first": {model[0]: RECIPES["nvfp4"]}, "none": {}, "same": {model[0]: RECIPES["fp32"]}}
    plain, changes = losses_in(lambda: (model(x) - y).square().mean(), cases)
    assert plain == pytest.approx(float((model(x) - y).detach().square().mean()))
    assert changes["first"] != 0
    assert changes["none"] == changes["same"] == 0
