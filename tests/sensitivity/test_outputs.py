"""Outputs in a recipe against the rounded products written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.nn import convert
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.precision import RECIPES, PrecisionPlan
from deepseek_mp.sensitivity.outputs import (
    can_estimate,
    exact_output,
    largest_of,
    needs_whole_batch,
    output_in,
    round_sample,
    why_not_estimated,
)


@pytest.mark.parametrize("name", ["bf16", "fp16", "tensor", "row", "block", "nvfp4"])
def test_a_linear_layer_multiplies_rounded_operands(name):
    layer, x, recipe = nn.Linear(256, 128), torch.randn(64, 256), RECIPES[name]
    made = output_in(layer, x, recipe, largest_of(x))
    left, right = rounded(x, recipe.fprop.left), rounded(layer.weight.detach(), recipe.fprop.right)
    bias = layer.bias.detach()
    expected = left @ right.t() + (rounded(bias, recipe.fprop.right) if recipe.is_plain else bias)
    dtype = torch.float16 if name == "fp16" else torch.bfloat16
    # Sums in another order may round to the next value of the output's type.
    torch.testing.assert_close(made, expected.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.equal(made, exact_output(layer, x))


def test_fp32_changes_nothing():
    layer, x = nn.Linear(32, 16), torch.randn(8, 32)
    assert torch.equal(output_in(layer, x, RECIPES["fp32"], largest_of(x)), layer(x))


def test_what_fp16_cannot_hold_is_infinite():
    layer = nn.Linear(4, 1, bias=False)
    nn.init.constant_(layer.weight, 200.0)
    x = torch.full((1, 4), 100.0)
    assert output_in(layer, x, RECIPES["fp16"], largest_of(x)).isinf().all()
    assert output_in(layer, x, RECIPES["bf16"], largest_of(x)).isfinite().all()


def test_rows_drawn_of_a_tensor_keep_its_scale():
    x = torch.randn(64, 32)
    x[63, 0] = 1e5
    side = RECIPES["tensor"].fprop.left
    assert torch.equal(round_sample(x[:8], side, largest_of(x)), rounded(x, side)[:8])
    assert not torch.equal(round_sample(x[:8], side, largest_of(x[:8])), rounded(x, side)[:8])


def test_a_norm_of_the_batch_leaves_its_running_mean_alone():
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    before = norm.running_mean.clone()
    made = output_in(norm, x, RECIPES["bf16"], largest_of(x))
    assert torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(made, norm(x), rtol=0.02, atol=0.02)
    assert needs_whole_batch(norm)
    assert not needs_whole_batch(norm.eval())


def test_no_hook_of_the_module_runs():
    layer, seen = nn.Conv2d(3, 4, 3), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(exact_output(layer, x), F.conv2d(x, layer.weight, layer.bias))
    assert not seen


def test_a_converted_unit_gives_what_it_gave_before():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(6, 5))
    x = torch.randn(2, 3, 8)
    before = exact_output(model[0], x)
    convert(model, PrecisionPlan.of("bf16"))
    assert torch.equal(exact_output(model[0], x), before)


def test_scales_by_parts_are_for_linear_layers():
    assert can_estimate(nn.Linear(2, 2), RECIPES["block"])
    assert can_estimate(nn.Conv2d(2, 2, 1), RECIPES["tensor"])
    assert not can_estimate(nn.Conv2d(2, 2, 1), RECIPES["block"])
    assert not can_estimate(nn.LayerNorm(2), RECIPES["tensor"])
    assert can_estimate(nn.LayerNorm(2), RECIPES["bf16"])


def test_recurrent_layers_say_why_not():
    assert "LSTM" in why_not_estimated(nn.LSTM(2, 2))
    assert why_not_estimated(nn.Embedding(4, 2)) is None
