"""The linear layer in FP8, alone: its numbers, what it keeps, and what it does not compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_runs import by_chance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.errors import ShapeError
from deepseek_mp.nn import functional
from deepseek_mp.nn.functional import Cast, Pair, Products, has_products, low_precision_linear
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.precision import RECIPES, Operand, Recipe, Role, as_fnuz, with_power_of_two
from deepseek_mp.precision.recipe import RoleRecipe

NAMED = [RECIPES[name] for name in ("tensor", "row", "row_gw_hp", "block", "mx")]
VARIANTS = [with_power_of_two(RECIPES["block"]), as_fnuz(RECIPES["tensor"]), as_fnuz(RECIPES["block"])]
ETA = {"fp8_e4m3": 7.0e-4, "fp8_e4m3fnuz": 7.0e-4, "fp8_e5m2": 2.8e-3, "fp8_e5m2fnuz": 2.8e-3, "bf16": 2.8e-6}
"""Relative mean square error of rounding Gaussian values to a format: 0.044 * 4**-mantissa bits."""
M, N, K = 96, 256, 384


def products(recipe: Recipe) -> Products:
    return Products(recipe=recipe, quantise="reference", product="reference")


def mixed(fprop: str, dgrad: str, wgrad: str) -> Recipe:
    """Each product as in the recipe of that name."""
    parts = {"fprop": RECIPES[fprop].fprop, "dgrad": RECIPES[dgrad].dgrad, "wgrad": RECIPES[wgrad].wgrad}
    return replace(RECIPES["block"], name="mixed", **parts)


def tensors(*lead: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [*lead, K], weight, bias and a gradient of the output, the first three as leaves."""
    x, g = torch.randn(*lead, K, dtype=dtype), torch.randn(*lead, N)
    weight, bias = torch.randn(N, K) / 20, torch.randn(N)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), g


def differentiate(y: Tensor, g: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, g.to(y.dtype)))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("recipe", [*NAMED, *VARIANTS], ids=str)
def test_the_three_products_are_as_exact_as_their_formats_allow(recipe: Recipe) -> None:
    x, weight, bias, g = tensors(M)
    y = low_precision_linear(x, weight, bias, products(recipe))
    dx, dw, db = differentiate(y, g, x, weight, bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.linear(*exact)
    wants = dict(zip(Role, (expected - exact[2], *differentiate(expected, g.bfloat16(), *exact[:2])), strict=True))
    for role, got in zip(Role, (y.double() - exact[2], dx, dw), strict=True):
        sides = recipe.role(role)
        rounding = ETA["bf16"] * 6 if role is Role.FPROP or not sides.left.is_scaled else 0  # of the result
        predicted = math.sqrt(ETA[sides.left.format.name] + ETA[sides.right.format.name] + rounding)
        measured = error(got, wants[role])
        assert measured < 1.1 * predicted, role
        if sides.left.is_scaled:
            assert measured > 0.8 * predicted, f"{role} did not run in FP8"
    assert torch.allclose(db, g.bfloat16().float().sum(0), atol=1e-4)


@pytest.mark.parametrize("recipe", NAMED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_of_results_and_gradients(recipe: Recipe, dtype: torch.dtype) -> None:
    x, weight, bias, g = tensors(3, 5, dtype=dtype)
    y = low_precision_linear(x, weight, bias, products(recipe))
    gradients = differentiate(y, g, x, weight, bias)
    assert (y.dtype, y.shape) == (torch.bfloat16, (3, 5, N))
    assert [tensor.dtype for tensor in gradients] == [dtype, torch.float32, torch.float32]
    assert [tensor.shape for tensor in gradients] == [x.shape, weight.shape, bias.shape]


@pytest.mark.parametrize("recipe", NAMED, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 129])
def test_added_rows_are_as_zeros_added_by_hand(recipe: Recipe, rows: int) -> None:
    x, weight, bias, g = tensors(rows)
    longer = torch.cat([x.detach(), torch.zeros(256 - rows, K)]).requires_grad_()
    few = low_precision_linear(x, weight, bias, products(recipe))
    many = low_precision_linear(longer, weight, bias, products(recipe))
    torch.testing.assert_close(few, many[:rows], rtol=2**-8, atol=1e-3)
    dx, dw, db = differentiate(few, g, x, weight, bias)
    wants = differentiate(many, torch.cat([g, torch.zeros(256 - rows, N)]), longer, weight, bias)
    rounding = 2**-8 if recipe.name == "row_gw_hp" else 1e-5  # of a result in bf16, of sums in another order
    for got, want in zip((dx, dw, db), (wants[0][:rows], *wants[1:]), strict=True):
        torch.testing.assert_close(got, want, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("recipe", NAMED, ids=str)
@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 4)], ids=str)
def test_any_leading_shape_is_rows(recipe: Recipe, lead: tuple[int, ...]) -> None:
    x, weight, bias, g = tensors(*lead)
    y = low_precision_linear(x, weight, bias, products(recipe))
    flat = low_precision_linear(x.view(-1, K), weight, bias, products(recipe))
    assert torch.equal(y, flat.view(*lead, N))
    for got, want in zip(differentiate(y, g, x, weight), differentiate(flat, g.view(-1, N), x, weight), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("recipe", NAMED, ids=str)
@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_without_rows_the_output_is_empty_and_gradients_are_zero(recipe: Recipe, lead: tuple[int, ...]) -> None:
    x, weight, bias, g = tensors(*lead)
    y = low_precision_linear(x, weight, bias, products(recipe))
    assert y.shape == (*lead, N)
    dx, dw, db = differentiate(y, g, x, weight, bias)
    assert dx.shape == x.shape
    assert not dw.any()
    assert not db.any()


def test_layouts_that_are_not_contiguous() -> None:
    weight = torch.randn(K, N).t().requires_grad_()
    x = torch.randn(K, M).t().requires_grad_()
    y = low_precision_linear(x, weight, None, products(RECIPES["block"]))
    y.float().sum().backward()  # whose gradient is one number, expanded
    other = [x.detach().contiguous().requires_grad_(), weight.detach().contiguous().requires_grad_()]
    want = low_precision_linear(*other, None, products(RECIPES["block"]))
    want.backward(torch.ones(M, N).bfloat16())
    assert torch.equal(y, want)
    assert torch.equal(x.grad, other[0].grad)
    assert torch.equal(weight.grad, other[1].grad)


# -- what is kept, and what is computed ------------------------------------------------------------------


def kept_bytes(call: Callable[[], Tensor]) -> list[int]:
    """Bytes of each tensor that the forward saves for backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sizes


@pytest.mark.parametrize(
    ("recipe", "bytes_each"), [("tensor", 1), ("row", 1), ("block", 1), ("mx", 1), ("row_gw_hp", 2)]
)
def test_one_byte_per_input_element_is_kept_for_wgrad(recipe: str, bytes_each: int) -> None:
    x, weight, _, _ = tensors(512)
    sizes = kept_bytes(lambda: low_precision_linear(x.detach(), weight, None, products(RECIPES[recipe])))
    assert bytes_each <= sum(sizes) / x.numel() < bytes_each + 0.15  # a scale of 4 bytes per 32 values at most


def test_a_bf16_input_is_kept_once_where_wgrad_is_in_bf16() -> None:
    x, weight, _, _ = tensors(M, dtype=torch.bfloat16)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        low_precision_linear(x.detach(), weight, None, products(RECIPES["row_gw_hp"]))
    assert [tensor.untyped_storage().data_ptr() for tensor in seen] == [x.untyped_storage().data_ptr()]


def test_nothing_is_kept_that_no_gradient_needs() -> None:
    x, weight, bias, _ = tensors(M)
    run = products(RECIPES["block"])
    frozen = kept_bytes(lambda: low_precision_linear(x, weight.detach(), None, run))
    assert weight.numel() <= sum(frozen) < 1.1 * weight.numel()
    assert kept_bytes(lambda: low_precision_linear(x.detach(), weight.detach(), bias, run)) == []
    with torch.no_grad():
        assert kept_bytes(lambda: low_precision_linear(x, weight, bias, run)) == []


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], bool, bool]]:
    """Shape, rows and columns of every call to `quantise`."""
    seen: list[tuple[tuple[int, ...], bool, bool]] = []
    original = functional.quantise

    def watched(x: Tensor, *args: Any, **options: Any) -> Any:
        seen.append((tuple(x.shape), args[3], args[4]))
        return original(x, *args, **options)

    monkeypatch.setattr(functional, "quantise", watched)
    return seen


def test_one_cast_of_each_tensor_where_its_products_agree(casts: list[Any]) -> None:
    x, weight, bias, g = tensors(M)
    y = low_precision_linear(x, weight, bias, products(RECIPES["block"]))
    assert casts == [((M, K), True, True), ((N, K), True, True)]
    differentiate(y, g, x, weight, bias)
    assert casts[2:] == [((M, N), True, True)]


def test_a_cast_for_each_product_where_they_differ(casts: list[Any]) -> None:
    x, weight, bias, g = tensors(M)
    y = low_precision_linear(x, weight, bias, products(mixed("block", "tensor", "row")))
    assert casts == [
        ((M, K), True, False),
        ((M, K), False, True),
        ((N, K), True, False),
        ((N, K), False, True),
    ]
    differentiate(y, g, x, weight, bias)
    assert casts[4:] == [((M, N), True, False), ((M, N), False, True)]


def test_no_cast_for_a_product_that_is_not_computed(casts: list[Any]) -> None:
    x, weight, bias, g = tensors(M)
    run = products(RECIPES["block"])
    with torch.no_grad():
        low_precision_linear(x, weight, bias, run)
    low_precision_linear(x.detach(), weight.detach(), None, run)
    assert [layouts for _, *layouts in casts] == [[True, False]] * 4
    casts.clear()
    differentiate(low_precision_linear(x.detach(), weight, bias, run), g, weight, bias)
    assert [layouts for _, *layouts in casts] == [[True, True], [True, False], [False, True]]
    casts.clear()
    differentiate(low_precision_linear(x, weight.detach(), None, run), g, x)
    assert [layouts for _, *layouts in casts] == [[True, False], [True, True], [True, False]]
    casts.clear()
    differentiate(low_precision_linear(x.detach(), weight.detach(), bias, run), g, bias)
    assert [layouts for _, *layouts in casts] == [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("fprop", "dgrad", "wgrad"), [("bf16", "row", "row"), ("row", "bf16", "row"), ("row", "row", "bf16")]
)
def test_a_product_in_bf16_is_an_ordinary_one(fprop: str, dgrad: str, wgrad: str) -> None:
    x, weight, bias, g = tensors(M)
    ours = low_precision_linear(x, weight, bias, products(mixed(fprop, dgrad, wgrad)))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        theirs = F.linear(x, weight, bias)
    pairs = zip(
        (fprop, dgrad, wgrad),
        (ours, *differentiate(ours, g, x, weight)),
        (theirs, *differentiate(theirs, g, x, weight)),
        strict=True,
    )
    for name, got, want in pairs:
        assert torch.equal(got, want) == (name == "bf16"), name


def test_regions_of_the_caller_change_nothing() -> None:
    x, weight, bias, g = tensors(M)
    for recipe in (RECIPES["row_gw_hp"], mixed("bf16", "bf16", "row"), RECIPES["block"]):
        y = low_precision_linear(x, weight, bias, products(recipe))
        want = [y, *differentiate(y, g, x, weight, bias)]
        with torch.autocast("cpu", torch.float16):
            y = low_precision_linear(x, weight, bias, products(recipe))
            got = [y, *differentiate(y, g, x, weight, bias)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), recipe.name


# -- among PyTorch's other parts -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [32, 5])
def test_an_activation_in_place_may_follow(rows: int) -> None:
    x, weight, bias, g = tensors(rows)
    run = products(RECIPES["row"])
    want = differentiate(F.relu(low_precision_linear(x, weight, bias, run)), g, x, weight)
    got = differentiate(F.relu_(low_precision_linear(x, weight, bias, run)), g, x, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias, _ = tensors(M)
    y = low_precision_linear(x, weight, bias, products(RECIPES["block"]))
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_weights_changed_between_two_forwards_are_used_and_the_first_backward_has_the_old() -> None:
    x, weight, bias, g = tensors(M)
    run = products(RECIPES["block"])
    first = low_precision_linear(x, weight, bias, run)
    old = differentiate(low_precision_linear(x, weight, bias, run), g, x)[0]
    with torch.no_grad():
        weight.mul_(2)
    second = low_precision_linear(x, weight, None, run)
    assert (
        torch.equal(second, (2 * (first.float() - bias)).bfloat16())
        or error(second, 2 * (first - bias).double()) < 0.02
    )
    assert torch.equal(differentiate(first, g, x)[0], old)
    assert error(differentiate(second, g, x)[0], 2 * old.double()) < 1e-6


class Two(nn.Module):
    """Two layers in FP8 around a norm, with an activation in place."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(K, N), nn.LayerNorm(N), nn.Linear(N, K)
        self.products = products(recipe)

    def forward(self, x: Tensor) -> Tensor:
        hidden = low_precision_linear(x, self.first.weight, self.first.bias, self.products).relu_()
        return low_precision_linear(self.norm(hidden.float()), self.second.weight, self.second.bias, self.products)


def results(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), (x, *model.parameters()))]


@pytest.mark.parametrize("recipe", NAMED, ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(recipe: Recipe, reentrant: bool) -> None:
    model, x = Two(recipe), torch.randn(2, 9, K)

    def whole(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        y.float().square().sum().backward()
        return [y, leaf.grad, *(parameter.grad for parameter in model.parameters())]

    straight = whole(model)
    recomputed = whole(lambda leaf: checkpoint(model, leaf, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(straight, recomputed, strict=True))


@pytest.mark.parametrize("recipe", NAMED, ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_gives_the_same_numbers(recipe: Recipe, backend: str, fresh_compiler: None) -> None:
    model = Two(recipe)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for lead in ((32,), (2, 9)):
        x = torch.randn(*lead, K)
        want, got = results(model, model, x), results(model, compiled, x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), lead


def test_compiled_code_takes_any_number_of_rows(fresh_compiler: None) -> None:
    model = Two(RECIPES["row"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (16, 48, 5, 21):
        x = torch.randn(rows, K)
        assert all(
            torch.equal(a, b) for a, b in zip(results(model, compiled, x), results(model, model, x), strict=True)
        )


# -- stochastic rounding ---------------------------------------------------------------------------------


BY_CHANCE = [by_chance(name) for name in ("tensor", "row", "block", "mx")]


def gradients_of(recipe: Recipe, seed: int, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients under this seed of PyTorch's generator."""
    x, weight, bias, g = leaves
    torch.manual_seed(seed)
    y = low_precision_linear(x, weight, bias, products(recipe))
    return [y.detach(), *differentiate(y, g, x, weight, bias)]


@pytest.mark.parametrize("recipe", BY_CHANCE, ids=lambda r: r.fprop.left.granularity.name)
def test_gradients_follow_from_the_seed_and_the_output_does_not(recipe: Recipe) -> None:
    leaves = tensors(M)
    first, same, other = (gradients_of(recipe, seed, leaves) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert [torch.equal(a, b) for a, b in zip(first, other, strict=True)] == [True, False, False, True]


@pytest.mark.parametrize("recipe", BY_CHANCE, ids=lambda r: r.fprop.left.granularity.name)
def test_the_mean_of_the_gradients_is_that_of_gradients_not_rounded(recipe: Recipe) -> None:
    """Of 64 draws it is as far from it as one draw by eight; the operands to the nearest are the same in all."""
    leaves = tensors(M)
    draws = [gradients_of(recipe, seed, leaves) for seed in range(64)]
    x, weight, _, g = leaves
    quantised, how = products(recipe), (False, True, "reference")
    for index, (tensor, cast) in enumerate(((weight, quantised.dgrad.right), (x, quantised.wgrad.right)), start=1):
        made = functional.quantise(tensor.detach(), cast.format, cast.granularity, cast.power_of_two, *how)
        held = dequantise(made[2], made[3], cast.granularity).double()
        exact = g.bfloat16().double()
        want = exact @ held.t() if index == 1 else exact.t() @ held[:, :M].t()
        one = sum(error(draw[index], want) for draw in draws) / len(draws)
        mean = torch.stack([draw[index].double() for draw in draws]).mean(0)
        assert error(mean, want) < 1.15 * one / 8


def test_only_casts_of_the_gradient_get_a_seed_and_each_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[Tensor | None] = []
    original = functional.quantise

    def watched(*args: Any, seed: Tensor | None) -> Any:
        seeds.append(seed)
        return original(*args, seed=seed)

    monkeypatch.setattr(functional, "quantise", watched)
    leaves = tensors(M)
    gradients_of(by_chance("block"), 1, leaves)
    one_side = replace(by_chance("block"), wgrad=RECIPES["block"].wgrad)
    gradients_of(one_side, 2, leaves)
    assert [seed is None for seed in seeds] == [True, True, False, True, True, False, True]
    assert seeds[2].dtype is torch.int64
    assert seeds[2] != seeds[5]


def test_a_network_learns_and_does_so_again_under_the_same_seed() -> None:
    data = torch.randn(64, K, generator=torch.Generator().manual_seed(5))

    def losses(seed: int) -> list[float]:
        torch.manual_seed(0)
        model = Two(by_chance("tensor"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        torch.manual_seed(seed)
        found = []
        for _ in range(15):
            loss = (model(data).float() - data).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    first = losses(1)
    assert first[-1] < 0.9 * first[0]
    assert losses(1) == first
    assert losses(2) != first


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_stochastic_rounding(reentrant: bool) -> None:
    model, x = Two(by_chance("row")), torch.randn(2, 9, K)

    def whole(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        call(x.detach().requires_grad_()).float().square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    recomputed = whole(lambda leaf: checkpoint(model, leaf, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(whole(model), recomputed, strict=True))


@pytest.mark.parametrize("recipe", BY_CHANCE, ids=lambda r: r.fprop.left.granularity.name)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_rounds_stochastically_alike(recipe: Recipe, backend: str, fresh_compiler: None) -> None:
    model, x = Two(recipe), torch.randn(32, K)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results(model, compiled, x)
    torch.manual_seed(7)
    want = results(model, model, x)
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(results(model, compiled, x), want, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results(model, compiled, x), want, strict=True))


# -- the values ------------------------------------------------------------------------------------------


def test_products_are_laid_out_by_role() -> None:
    made = products(RECIPES["row_gw_hp"])
    row = Cast("fp8_e4m3", "row", False)
    assert (made.fprop, made.dgrad, made.wgrad) == (Pair(row, row), Pair(row, row), None)
    tensor = products(with_power_of_two(RECIPES["tensor"]))
    assert tensor.dgrad == Pair(Cast("fp8_e5m2", "tensor", True), Cast("fp8_e4m3", "tensor", True))
    assert RECIPES["tensor"].operand(Role.DGRAD, Operand.WEIGHT).format.name == "fp8_e4m3"


def test_recipes_that_layers_multiply_in() -> None:
    others = {name for name, recipe in RECIPES.items() if not has_products(recipe)}
    assert others == {"fp64", "fp32", "tf32", "hf32", "bf16", "fp16", "nvfp4"}
    side = RECIPES["row"].fprop.left
    for change in ({"scale_format": "fp8_e4m3"}, {"granularity": "1x16"}, {"format": "fp4_e2m1"}, {"rule": "none"}):
        other = replace(side, **change)
        assert not has_products(replace(RECIPES["row"], fprop=RoleRecipe(left=other, right=side)))


def test_equal_products_are_equal_values() -> None:
    assert products(RECIPES["row"]) == products(RECIPES["row"])
    assert hash(products(RECIPES["row"])) == hash(products(RECIPES["row"]))
    assert products(RECIPES["row"]) != replace(products(RECIPES["row"]), product="native")


@pytest.mark.parametrize(
    ("x", "weight", "match"),
    [
        (torch.ones(4, 256), torch.ones(128, 128), r"an input \[4, 256\].*for a weight \[128, 128\] in block"),
        (torch.ones(4, 128, dtype=torch.int64), torch.ones(128, 128), "torch.int64.*floating-point inputs"),
        (torch.ones(4, 128, dtype=torch.complex64), torch.ones(128, 128), "torch.complex64.*floating-point inputs"),
        (torch.ones(()), torch.ones(128, 128), r"an input \[\] of"),
        (torch.ones(4, 128), torch.ones(100, 128), r"a weight \[100, 128\].*multiples of 128.*apply the plan again"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sizes(x: Tensor, weight: Tensor, match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        low_precision_linear(x, weight, None, products(RECIPES["block"]))
