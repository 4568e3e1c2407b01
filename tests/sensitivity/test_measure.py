"""The scores against their formulas, written out."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from deepseek_mp.ops.statistics import ERROR_FIELDS, spread
from deepseek_mp.precision import RECIPES, Operand, Role
from deepseek_mp.sensitivity import measure
from deepseek_mp.sensitivity.measure import BY_ROW, OPERAND_FIELDS, PRODUCT_OPERANDS, Operands, Seen, energies, spreads
from deepseek_mp.sensitivity.measure import effect as effect_of
from deepseek_mp.sensitivity.outputs import exact_output, largest_of, output_in
from deepseek_mp.sensitivity.sampling import Sample, Terms


def seen_of(x, g, *, by_row=True, groups=None, count=10, curvature=1.0):
    sample = Sample(index=None, by_row=by_row, groups=groups or x.shape[0])
    terms = Terms(count=count, loss=torch.tensor(1.0), curvature=curvature)
    return Seen(x=x, g=g, largest_x=largest_of(x), largest_g=largest_of(g), sample=sample, terms=terms)


def effect(layer, recipe, exact, seen):
    return effect_of(layer, recipe, exact, seen, Operands(layer, seen))


def test_both_orders_of_a_linear_layer():
    layer, x, g = nn.Linear(32, 16), torch.randn(8, 32), torch.randn(8, 16)
    recipe, exact = RECIPES["tensor"], exact_output(layer, x)
    found = effect(layer, recipe, exact, seen_of(x, g, groups=80, count=100, curvature=0.5))
    by_row = (g * (output_in(layer, x, recipe, largest_of(x)) - exact)).sum(1)
    assert float(found[0]) == pytest.approx(10 * float(by_row.sum()), rel=1e-4)
    assert float(found[1]) == pytest.approx(80**2 / 8 * float(by_row.var()), rel=1e-4)
    assert float(found[2]) == pytest.approx(10 * 0.5 * 100 * 0.5 * float(by_row.square().sum()), rel=1e-4)


def test_rows_of_an_item_are_added_before_they_are_squared():
    layer, x, g = nn.Linear(8, 4), torch.randn(3, 5, 8), torch.randn(3, 5, 4)
    exact = exact_output(layer, x)
    found = effect(layer, RECIPES["bf16"], exact, seen_of(x, g, by_row=False))
    by_item = (g * (output_in(layer, x, RECIPES["bf16"], largest_of(x)) - exact)).sum((1, 2))
    assert float(found[2]) == pytest.approx(5 * float(by_item.square().sum()), rel=1e-4)


def test_an_overflow_is_an_infinite_effect_also_where_no_gradient_flows():
    layer = nn.Linear(4, 2, bias=False)
    nn.init.constant_(layer.weight, 300.0)
    x = torch.full((3, 4), 300.0)
    found = effect(layer, RECIPES["fp16"], exact_output(layer, x), seen_of(x, torch.zeros(3, 2)))
    assert found[0] == float("inf")
    assert found[2] == float("inf")


def test_each_operand_is_rounded_along_its_own_sum():
    """One input channel is tiny: only groups that run over the tokens of that channel keep it."""
    layer, x, g = nn.Linear(128, 128), torch.randn(128, 128), torch.randn(128, 128)
    x[:, 0] *= 1e-6
    errors = Operands(layer, seen_of(x, g)).errors([RECIPES["block"]])[0]
    underflow = dict(zip(PRODUCT_OPERANDS, errors[:, 3].tolist(), strict=True))
    assert underflow[Role.FPROP, Operand.INPUT] > 0.005
    assert underflow[Role.WGRAD, Operand.INPUT] < 0.001


def test_small_tokens_count_by_the_inputs_that_are_theirs_alone():
    """Beside large gradients small ones are lost, which matters where no other token has a value in an input."""
    layer, x, g = nn.Linear(128, 128), torch.randn(128, 128), torch.randn(128, 128)
    g[::2] *= 1e-6
    ideal = 0.044 / 4**3
    place = PRODUCT_OPERANDS.index((Role.WGRAD, Operand.GRAD_OUTPUT))

    def by_row():
        return float(Operands(layer, seen_of(x, g)).errors([RECIPES["row"]])[0][place, BY_ROW])

    assert by_row() < 2 * ideal
    x[1::2, :16] = 0.0
    assert by_row() == pytest.approx(16 / 128, rel=0.1)


@pytest.mark.parametrize(("name", "expected"), [("bf16", 2.8e-6), ("block", 7.0e-4), ("nvfp4", 8.5e-3)])
def test_normal_operands_have_the_error_of_their_format(name, expected):
    layer = nn.Linear(256, 256)
    nn.init.normal_(layer.weight)
    errors = Operands(layer, seen_of(torch.randn(256, 256), torch.randn(256, 256))).errors([RECIPES[name]])[0]
    assert errors[:, 0].tolist() == pytest.approx([expected] * 6, rel=0.12)


def test_the_energy_of_rows_is_that_of_their_outer_products():
    layer, x, g = nn.Linear(6, 3), torch.randn(5, 6), torch.randn(5, 3)
    outer = torch.einsum("tn,tk->tnk", g, x).square().sum()
    assert energies(layer, seen_of(x, g, groups=50)).tolist() == pytest.approx([10 * float(outer)] * 2, rel=1e-5)


def test_the_energy_of_items_is_that_of_their_gradients():
    layer, x, g = nn.Linear(6, 3), torch.randn(4, 5, 6), torch.randn(4, 5, 3)
    by_item = torch.einsum("btn,btk->bnk", g, x).square().sum()
    by_row = torch.einsum("btn,btk->btnk", g, x).square().sum()
    found = energies(layer, seen_of(x, g, by_row=False)).tolist()
    assert found == pytest.approx([float(by_item), float(by_row)], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2}])
def test_the_energies_of_a_convolution(settings):
    layer, x = nn.Conv2d(4, 6, 3, **settings), torch.randn(3, 4, 9, 9)
    g = torch.randn_like(layer(x))
    found = energies(layer, seen_of(x, g, by_row=False)).tolist()
    by_item = 0.0
    for item, gradient in zip(x.split(1), g.split(1), strict=True):
        by_item += float(torch.autograd.grad(layer(item), layer.weight, gradient)[0].square().sum())
    assert found[0] == pytest.approx(by_item, rel=1e-4)
    if layer.groups == 1:
        windows = nn.functional.unfold(x, 3, layer.dilation, layer.padding, layer.stride)
        by_row = (windows.square().sum(1) * g.flatten(2).square().sum(1)).sum()
        assert found[1] == pytest.approx(float(by_row), rel=1e-4)


def test_units_without_products_have_no_energy_and_no_weight_may_be_missing():
    norm, x = nn.LayerNorm(4, elementwise_affine=False), torch.randn(3, 4)
    assert not energies(norm, seen_of(x, x)).any()
    assert spreads(norm, seen_of(x, x))[1].tolist() == [0.0] * 6


def test_a_frozen_weight_has_no_gradient_that_scatters():
    x = torch.ones(4, 8)
    assert energies(nn.Linear(8, 8), seen_of(x, x)).all()
    assert not energies(nn.Linear(8, 8).requires_grad_(False), seen_of(x, x)).any()


@pytest.mark.parametrize("both_ways", [True, False])
def test_channels_that_a_large_weight_makes_up_for_are_not_lost_without_notice(both_ways):
    """Gains of the outputs are undone behind: where the gradient is large the weight is small, and the other way."""
    gains = torch.ones(64)
    gains[::2] = 1e6
    layer, g = nn.Linear(32, 64), torch.randn(48, 64) / gains
    with torch.no_grad():
        layer.weight.mul_(gains[:, None])
    place = PRODUCT_OPERANDS.index((Role.DGRAD, Operand.GRAD_OUTPUT))
    (found,) = Operands(layer, seen_of(torch.randn(48, 32), g), both_ways=both_ways).errors([RECIPES["row"]])
    named = dict(zip(OPERAND_FIELDS, found[place].tolist(), strict=True))
    assert named["by_row"] < 0.002
    assert named["product"] > 0.4
    exact, lost = g @ layer.weight, (g * (gains == 1)) @ layer.weight
    assert named["product"] == pytest.approx(((exact - lost).square().sum() / exact.square().sum()).item(), abs=0.1)


def test_one_way_stands_for_both_in_input_and_weight():
    layer, x, g = nn.Linear(128, 128), torch.randn(128, 128), torch.randn(128, 128)
    x[:, 0] *= 1e-6
    both, one = (Operands(layer, seen_of(x, g), both_ways=ways).errors([RECIPES["block"]])[0] for ways in (True, False))
    named = [dict(zip(PRODUCT_OPERANDS, errors.unbind(), strict=True)) for errors in (both, one)]
    for which in ((Role.FPROP, Operand.INPUT), (Role.DGRAD, Operand.GRAD_OUTPUT), (Role.WGRAD, Operand.GRAD_OUTPUT)):
        torch.testing.assert_close(named[0][which], named[1][which], rtol=1e-4, atol=1e-6)
    count = len(ERROR_FIELDS)  # what errors do to a product depends on the product
    assert torch.equal(named[1][Role.WGRAD, Operand.INPUT][:count], named[1][Role.FPROP, Operand.INPUT][:count])
    assert not torch.equal(named[0][Role.WGRAD, Operand.INPUT], named[1][Role.WGRAD, Operand.INPUT])


def test_recipes_are_compared_at_once_as_they_are_one_by_one(monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(128, 256)
    x, g = torch.randn(256, 128), torch.randn(256, 256)
    recipes = [RECIPES[name] for name in ("bf16", "tensor", "row", "block", "row_gw_hp")]
    for most in (2**25, 3 * 256 * 256, 1):
        monkeypatch.setattr(measure, "MOST_AT_ONCE", most)
        together = Operands(layer, seen_of(x, g)).errors(recipes)
        for recipe, found in zip(recipes, together, strict=True):
            (alone,) = Operands(layer, seen_of(x, g)).errors([recipe])
            torch.testing.assert_close(found, alone)


def test_a_probe_compares_some_rows_of_a_weight(monkeypatch):
    monkeypatch.setattr(measure, "WEIGHT_ROWS", 64)
    layer = nn.Linear(128, 256)
    with torch.no_grad():
        layer.weight[1::4] = 1e-12
    x, g = torch.randn(256, 128), torch.randn(256, 256)
    place, underflow = PRODUCT_OPERANDS.index((Role.FPROP, Operand.WEIGHT)), ERROR_FIELDS.index("underflow")
    lost = []
    for ways in (True, False):
        (errors,) = Operands(layer, seen_of(x, g), both_ways=ways).errors([RECIPES["tensor"]])
        lost.append(float(errors[place, underflow]))
    assert lost == [pytest.approx(0.25, abs=0.02), pytest.approx(0.0, abs=0.02)]


def test_the_largest_magnitude_is_that_of_the_whole_tensor_and_the_rest_of_what_was_drawn():
    layer, x, g = nn.Linear(4, 2), torch.randn(3, 4), torch.randn(3, 2)
    seen = replace(seen_of(x, g), largest_x=torch.tensor(300.0), largest_g=torch.tensor(200.0))
    found, drawn = spreads(layer, seen), torch.stack([spread(t) for t in (x, layer.weight, g)])
    assert found[:, 0].tolist() == [300.0, float(drawn[1, 0]), 200.0]
    assert torch.equal(found[:, 1:], drawn[:, 1:])
