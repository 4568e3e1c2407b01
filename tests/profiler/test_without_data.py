"""Errors of outputs from weights alone, against the errors outputs really have."""

import pytest
import torch
from torch import nn

from deepseek_mp.precision import RECIPES
from deepseek_mp.profiler.without_data import normal_error, output_errors
from deepseek_mp.sensitivity.outputs import exact_output, largest_of, output_in

NAMES = ("fp16", "row", "nvfp4")


@pytest.mark.parametrize("name", NAMES)
def test_the_expected_error_is_that_of_normal_inputs(name):
    layer, x, recipe = nn.Linear(256, 256, bias=False), torch.randn(512, 256), RECIPES[name]
    nn.init.normal_(layer.weight)
    exact = exact_output(layer, x)
    true = (output_in(layer, x, recipe, largest_of(x)) - exact).square().sum() / exact.square().sum()
    # The output's own rounding is not part of it: half as much again in a plain format.
    assert output_errors(layer, [recipe])[name] == pytest.approx(float(true), rel=0.15 if name != "fp16" else 0.4)


def test_formats_are_in_order():
    errors = [normal_error(RECIPES[name].fprop.left) for name in ("fp32", *NAMES)]
    assert errors == sorted(errors)
    assert errors[0] == 0


def test_units_without_products_have_none():
    assert output_errors(nn.LayerNorm(4), [RECIPES["bf16"]]) == {}
    assert set(output_errors(nn.Conv2d(2, 2, 3), [RECIPES["bf16"], RECIPES["block"]])) == {"bf16"}


def test_the_default_device_changes_nothing():
    side = RECIPES["row"].fprop.left
    with torch.device("meta"):
        found = normal_error(side)
    assert found == normal_error(side)
