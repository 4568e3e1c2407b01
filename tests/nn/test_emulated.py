"""Emulated layers: rounded operands in all three products, each along its sum, and only where that was agreed to."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp import autocast
from deepseek_mp.errors import ShapeError
from deepseek_mp.nn import apply, register_unit, revert
from deepseek_mp.nn.emulated import can_be_emulated, can_be_rounded, emulated_linear
from deepseek_mp.nn.held import HeldWeights
from deepseek_mp.nn.windows import as_rows, padded, windows_of
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.precision import FORMATS, GRANULARITIES, RECIPES, PrecisionPlan, Reason, Recipe, Rounding, ScaleRule
from deepseek_mp.precision.recipe import OperandRecipe, RoleRecipe

NVFP4 = RECIPES["nvfp4"]
BF16_STEP = 2.0**-8
"""What rounding to bf16 changes a number by at most, relatively."""


def side(format: str, granularity: str = "tensor", **options: Any) -> OperandRecipe:
    found = GRANULARITIES[granularity]
    return OperandRecipe(format=FORMATS[format], granularity=found, rule=ScaleRule.CURRENT, **options)


def of_six(name: str, *sides: OperandRecipe) -> Recipe:
    """The recipe of these operands, left and right of fprop, dgrad and wgrad."""
    pairs = [RoleRecipe(left=sides[i], right=sides[i + 1]) for i in (0, 2, 4)]
    return Recipe(name=name, fprop=pairs[0], dgrad=pairs[1], wgrad=pairs[2])


PLAIN = OperandRecipe(format=FORMATS["bf16"])
SIX = of_six(
    "six", side("fp4_e2m1", "1x16", scale_format="fp8_e4m3"), side("int8", "row"), side("fp8_e5m2", "1x32"),
    side("fp4_e2m1", "1x32", power_of_two=True), side("fp8_e4m3", "128x128"), OperandRecipe(format=FORMATS["fp16"]),
)  # fmt: skip
"""Another operand recipe for every operand of every product."""
SIX_TENSORS = of_six(
    "six_tensors", side("fp4_e2m1"), side("int8"), side("fp8_e5m2"), side("fp8_e4m3"), side("int4"), PLAIN
)
EMULATED = [NVFP4, SIX, SIX_TENSORS, replace(NVFP4, name="half", wgrad=RECIPES["bf16"].wgrad)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 4)
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def product(left: Tensor, right: Tensor, role: RoleRecipe) -> Tensor:
    """left [A, C] times right [B, C] transposed, of operands that are rounded as they are written, in float64."""
    return rounded(left.float(), role.left).double() @ rounded(right.float(), role.right).double().t()


# -- linear layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", EMULATED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_product_of_a_linear_layer_reads_its_own_rounded_operands(recipe: Recipe, dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, 40).to(dtype).requires_grad_()
    weight, bias = torch.randn(24, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    y = emulated_linear(x, weight, bias, recipe)
    gradient = torch.randn(3, 7, 24).bfloat16()
    y.backward(gradient)
    rows, g = x.detach().view(21, 40), gradient.view(21, 24)
    assert (y.dtype, x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, dtype, *[torch.float32] * 2)
    expected = product(rows, weight, recipe.fprop) + bias.bfloat16().double()
    torch.testing.assert_close(y.double(), expected.view_as(y), rtol=BF16_STEP, atol=1e-5)
    dx = product(g, weight.t(), recipe.dgrad)
    torch.testing.assert_close(x.grad.double(), dx.view_as(x), rtol=BF16_STEP, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), product(g.t(), rows.t(), recipe.wgrad), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, g.float().sum(0))


def test_groups_lie_along_the_sum_of_their_product() -> None:
    """Columns of very different size: along the sum they share scales, across it they do not."""
    x = torch.randn(64, 64) * 10.0 ** torch.linspace(-4, 0, 64)
    weight = torch.eye(64, requires_grad=True)  # held exactly, so the product shows the other operand
    y = emulated_linear(x, weight, None, NVFP4)
    assert relative(y, rounded(x, NVFP4.fprop.left)) < BF16_STEP
    y.backward(torch.eye(64).bfloat16())
    assert relative(weight.grad, rounded(x.t(), NVFP4.wgrad.right).t()) < 1e-6
    assert relative(weight.grad, rounded(x, NVFP4.wgrad.right)) > 0.01


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(24, 40, requires_grad=True)
    y = emulated_linear(x, weight, None, NVFP4)
    assert y.shape == (*shape[:-1], 24)
    y.float().sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.isfinite().all()


def test_only_the_gradients_that_are_needed() -> None:
    weight, bias = torch.randn(24, 40), torch.randn(24, requires_grad=True)
    emulated_linear(torch.randn(5, 40), weight, bias, NVFP4).sum().backward()
    assert bias.grad.tolist() == [5.0] * 24
    x = torch.randn(5, 40, requires_grad=True)
    emulated_linear(x, weight, None, NVFP4).sum().backward()
    assert relative(x.grad, product(torch.ones(5, 24), weight.t(), NVFP4.dgrad)) < BF16_STEP


def test_a_value_that_is_not_finite_is_seen() -> None:
    x, weight = torch.randn(5, 40), torch.randn(24, 40)
    clean = emulated_linear(x, weight, None, NVFP4)
    x[2, 3] = float("inf")
    y = emulated_linear(x, weight, None, NVFP4)
    assert y[2].isnan().all()
    assert torch.equal(y[:2], clean[:2])


def test_the_error_of_a_product_of_normal_numbers() -> None:
    """Two independent errors of 0.095 each."""
    x, weight = torch.randn(256, 512), torch.randn(128, 512)
    assert 0.12 < relative(emulated_linear(x, weight, None, NVFP4), x @ weight.t()) < 0.15


def test_stochastic_gradients_have_the_mean_of_exact_ones() -> None:
    by_chance = replace(NVFP4.dgrad.left, rounding=Rounding.STOCHASTIC, power_of_two=True, scale_format=None)
    recipe = replace(
        NVFP4, name="by_chance", dgrad=RoleRecipe(left=by_chance, right=OperandRecipe(format=FORMATS["fp32"]))
    )
    weight, gradient = torch.randn(24, 40), torch.randn(9, 24)
    made = []
    for _ in range(200):
        x = torch.randn(9, 40, requires_grad=True)
        emulated_linear(x, weight, None, recipe).backward(gradient.bfloat16())
        made.append(x.grad)
    exact = gradient.bfloat16().float() @ weight
    assert relative(made[0], exact) > 0.1
    assert relative(torch.stack(made).mean(0), exact) < 1.2 * relative(made[0], exact) / 200**0.5


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"an input \[3, 5\] of torch.float32 for a weight \[2, 4\] in nvfp4"):
        emulated_linear(torch.randn(3, 5), torch.randn(2, 4), None, NVFP4)


# -- convolutions --------------------------------------------------------------------------------------

CONVOLUTIONS: list[Any] = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "circular"}),
    (nn.Conv3d, {"kernel_size": 2, "padding": 1}),
]


@pytest.mark.parametrize("recipe", EMULATED, ids=str)
@pytest.mark.parametrize(("kind", "settings"), CONVOLUTIONS)
def test_a_convolution_is_a_linear_layer_over_its_windows(kind: Any, settings: Any, recipe: Recipe) -> None:
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    conv = kind(20, 24, **settings)
    model = nn.Sequential(conv)
    plan = apply(model, PrecisionPlan.of("fp32", {"0": recipe}), emulate=True)
    assert (plan.decisions[0].new, plan.decisions[0].reason) == (recipe.name, Reason.EMULATED)
    x = torch.randn(2, 20, *[5] * dims, requires_grad=True)
    y = model(x)
    assert y.dtype is torch.float32
    assert y.is_contiguous()
    gradient = torch.randn_like(y)
    y.backward(gradient)

    windows, whole = windows_of(conv), padded(x, conv)
    rows, matrix = windows.unfolded(whole.detach()), as_rows(conv.weight.detach())
    g = gradient.bfloat16().movedim(1, -1).flatten(0, -2)
    # Where scales are of whole tensors, BF16 is rounded to on the way too.
    some = {"rtol": 2 * BF16_STEP, "atol": 0.02}
    out = product(rows, matrix, recipe.fprop)
    if conv.bias is not None:
        out = out + conv.bias.bfloat16().double()
        torch.testing.assert_close(conv.bias.grad, gradient.bfloat16().float().sum([0, *range(2, dims + 2)]))
    expected = out.view(2, *y.shape[2:], 24).movedim(-1, 1)
    torch.testing.assert_close(y.double(), expected, **some)
    dw = product(g.t(), rows.t(), recipe.wgrad).view(24, *conv.kernel_size, 20).movedim(-1, 1)
    assert relative(conv.weight.grad, dw) < 0.004
    back = windows.summed_back(product(g, matrix.t(), recipe.dgrad), whole.shape)
    (dx,) = torch.autograd.grad(whole, x, back.float())
    assert relative(x.grad, dx) < 0.004


def test_memory_formats_and_single_samples_are_as_the_convolution_has_them() -> None:
    for recipe in (NVFP4, SIX_TENSORS):
        conv = nn.Conv2d(16, 8, 3)
        apply(nn.Sequential(conv), PrecisionPlan.of("bf16", {"0": recipe}), emulate=True)
        x = torch.randn(2, 16, 6, 6)
        last = conv(x.to(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, conv(x))
        assert torch.equal(conv(x[:1])[0], conv(x[0]))
        conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
        conv(x).sum().backward()
        assert conv.weight.grad.stride() == conv.weight.stride()


def test_groups_of_a_convolution_have_scales_of_tensors_only() -> None:
    grouped = nn.Conv2d(16, 32, 3, groups=4)
    with pytest.warns(UserWarning, match="no layer of this model runs in nvfp4"):
        plan = apply(nn.Sequential(grouped), "nvfp4", emulate=True)
    assert (plan.decisions[0].new, plan.decisions[0].reason) == ("bf16", Reason.NO_KERNEL)
    assert "convolutions without groups only" in plan.decisions[0].detail
    apply(nn.Sequential(grouped), PrecisionPlan.of("fp32", {"0": SIX_TENSORS}), emulate=True)
    x = torch.randn(2, 16, 6, 6)
    expected = F.conv2d(
        rounded(x, SIX_TENSORS.fprop.left), rounded(grouped.weight, SIX_TENSORS.fprop.right), grouped.bias, groups=4
    )
    assert relative(grouped(x), expected) < 0.006


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_fp8_with_one_scale_is_multiplied_in_bf16(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    conv = kind(4, 6, 3)
    model = nn.Sequential(conv)
    plan = apply(model, PrecisionPlan.of("fp32", {"0": "tensor"}), emulate=True)
    assert "rounded to tensor and multiplied in BF16" in plan.decisions[0].detail
    x = torch.randn(2, 4, *[8] * dims, requires_grad=True)
    y = model(x)
    assert y.dtype is torch.float32
    g = torch.randn_like(y)
    y.backward(g)
    plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    narrow, wide = RECIPES["tensor"].fprop.left, RECIPES["tensor"].dgrad.left
    qx, qw = rounded(x, narrow).requires_grad_(), rounded(conv.weight, narrow).requires_grad_()
    exact = plain(qx, qw, conv.bias)
    exact.backward(rounded(g.bfloat16().float(), wide))  # in the region's format first
    assert relative(y, exact) < 0.004  # bf16 rounds the result, before and after the scale
    assert relative(x.grad, qx.grad) < 0.004
    assert relative(conv.weight.grad, qw.grad) < 0.004
    assert relative(y, plain(x, conv.weight, conv.bias)) > 0.02


def test_a_replaced_convolution_is_left_alone() -> None:
    conv = nn.Conv2d(3, 8, 3)
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias) * 2
    for recipe in ("tensor", "nvfp4"):
        with pytest.warns(UserWarning, match="no layer of this model runs in"):
            plan = apply(nn.Sequential(conv), recipe, emulate=True)
        assert plan.decisions[0].reason is Reason.NO_KERNEL


# -- which layers, and where ---------------------------------------------------------------------------


def test_it_is_emulation_and_has_to_be_asked_for() -> None:
    plan = apply(network(), "tensor", emulate=True)
    reasons = {decision.layer: (decision.new, decision.reason) for decision in plan.decisions}
    assert reasons["0"] == reasons["2"] == ("tensor", Reason.EMULATED)
    assert "multiplied in BF16" in plan.decisions[0].detail


@pytest.mark.filterwarnings("ignore:no layer of this model runs in")
@pytest.mark.parametrize("recipe", ["row", "block", "delayed", "row_gw_hp"])
def test_scales_of_parts_fall_back(recipe: str) -> None:
    assert not can_be_emulated(RECIPES[recipe], nn.Conv2d)
    plan = apply(network(), recipe, emulate=True)
    assert (plan.decisions[0].new, plan.decisions[0].reason) == ("bf16", Reason.NO_KERNEL)


def test_nvfp4_is_for_linear_layers_and_convolutions_of_any_size() -> None:
    model = nn.Sequential(nn.Embedding(9, 20), nn.Conv1d(7, 7, 3), nn.LayerNorm(18), nn.Linear(18, 5), nn.Linear(5, 3))
    plan = apply(model, "nvfp4", emulate=True)
    got = {decision.layer: (decision.new, decision.reason) for decision in plan.decisions}
    assert got == {
        "0": ("bf16", Reason.NO_KERNEL),
        "1": ("nvfp4", Reason.EMULATED),
        "2": ("bf16", Reason.NO_KERNEL),
        "3": ("nvfp4", Reason.EMULATED),
        "4": ("bf16", Reason.OUTPUT_LAYER),
    }
    assert str(plan.decisions[3]).startswith("3 fp32 -> nvfp4 (emulated: rounded to nvfp4 and multiplied in FP32")
    named = apply(model, PrecisionPlan.of("nvfp4", {"4": "nvfp4"}), emulate=True)
    assert (named.decisions[4].new, named.decisions[4].reason) == ("nvfp4", Reason.EMULATED)
    assert model[4](torch.randn(2, 5)).dtype is torch.bfloat16


def test_what_can_be_rounded() -> None:
    assert can_be_emulated(NVFP4, nn.Linear)
    assert can_be_emulated(NVFP4, nn.Conv2d)
    assert not can_be_emulated(NVFP4, nn.Conv2d, groups=2)
    assert not can_be_emulated(NVFP4, nn.ConvTranspose2d)
    assert not can_be_emulated(RECIPES["tensor"], nn.Linear)  # it is multiplied, on all devices
    assert can_be_emulated(RECIPES["tensor"], nn.Conv2d, groups=2)
    assert not can_be_rounded(RECIPES["delayed"])
    assert not can_be_rounded(RECIPES["fp64"])


def test_a_taught_kind_of_linear_layer_is_no_linear_layer() -> None:
    @register_unit
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.warns(UserWarning, match="no layer of this model runs in nvfp4"):
        assert apply(nn.Sequential(Twice(8, 8)), "nvfp4", emulate=True).decisions[0].reason is Reason.NO_KERNEL


def test_it_stands_beside_layers_in_fp8() -> None:
    """Whose outputs are lazy tensors in training."""
    model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128), nn.Linear(128, 8))
    apply(model, PrecisionPlan.of("bf16", {"0": "block", "2": "nvfp4"}), emulate=True)
    x = torch.randn(4, 128)
    with autocast("cpu", "bf16"):
        hidden = model[1](model[0](x))
        y = model[2](hidden)
    values = hidden + 0
    assert relative(y, product(values, model[2].weight, NVFP4.fprop) + model[2].bias) < 0.004
    y.sum().backward()
    assert model[0].weight.grad.isfinite().all()


def test_copies_and_pickles_are_emulated_too() -> None:
    model = network()
    apply(model, "nvfp4", emulate=True)
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].unit_precision is model[0].unit_precision
        assert torch.equal(other[0](x), model[0](x))


def test_its_weight_is_not_held() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 8))
    apply(model, PrecisionPlan.of("bf16", {"0": "nvfp4", "1": "block"}), emulate=True)
    held = HeldWeights(model)
    with held.lent(0):
        assert [unit.held_weight is not None for unit in model] == [False, True, False]


def test_under_an_fp64_base_inputs_are_fp32_first() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).double())
    apply(model, PrecisionPlan.of("fp64", {"0": "nvfp4"}), emulate=True)
    assert model(torch.randn(2, 8, dtype=torch.float64)).dtype is torch.float64


@pytest.mark.parametrize("recipe", ["nvfp4", "tensor"])
def test_compiled_code_computes_the_same(recipe: str, fresh_compiler: None) -> None:
    model = network()
    apply(model, recipe, emulate=True)
    x = torch.randn(2, 3, 8, 8)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with autocast("cpu", "bf16"):
            loss = run(x).float().square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-2, atol=1e-3)


def test_products_do_not_follow_the_region_around() -> None:
    x, weight = torch.randn(64, 512), torch.randn(32, 512)
    plain = emulated_linear(x, weight, None, NVFP4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(emulated_linear(x, weight, None, NVFP4), plain)
    values = rounded(x, NVFP4.fprop.left).double() @ rounded(weight, NVFP4.fprop.right).double().t()
    assert relative(plain, values) < 0.6 * BF16_STEP  # the one rounding to bf16


@pytest.mark.parametrize("recipe", ["tensor", "nvfp4"])
def test_a_network_learns_and_reverts(recipe: str) -> None:
    model = network()
    apply(model, recipe, emulate=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    losses = []
    for _ in range(20):
        with autocast("cpu", "bf16"):
            loss = F.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    revert(model)
    assert type(model[0]) is nn.Conv2d
