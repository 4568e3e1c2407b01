"""A 1x1 convolution in FP8: the bits of a linear layer, the memory format of PyTorch's convolution."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.backends import autocast
from deepseek_mp.errors import ShapeError
from deepseek_mp.nn import Unit, apply, revert
from deepseek_mp.nn.conv1x1 import as_matrix, conv1x1, obstacle
from deepseek_mp.nn.functional import Products, low_precision_linear
from deepseek_mp.nn.lazy import Lazy
from deepseek_mp.precision import RECIPES, PrecisionPlan, Reason, Recipe

NAMES = ["tensor", "delayed", "row", "row_gw_hp", "block", "mx"]
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
C, OUT = 128, 256
EXTENTS = {1: (7,), 2: (3, 5), 3: (2, 3, 2)}


def products(recipe: str | Recipe = "block") -> Products:
    found = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return Products(recipe=found, quantise="reference", product="reference")


def tensors(dims: int, *, batch: int | None = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, as leaves."""
    lead = () if batch is None else (batch,)
    x = torch.randn(*lead, C, *EXTENTS[dims], dtype=dtype)
    weight, bias = torch.randn(OUT, C, *[1] * dims) / 10, torch.randn(OUT)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def channels_last(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=CHANNELS_LAST[x.dim() - 2]).requires_grad_()


def gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    return list(torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y.dtype)))


def as_linear(x: Tensor, weight: Tensor, bias: Tensor | None, how: Products) -> list[Tensor]:
    """Output and gradients of the linear layer over the channels, in the shapes of the convolution's."""
    dims = weight.dim() - 2
    wide = x.detach().movedim(-1 - dims, -1).contiguous().requires_grad_()
    matrix = weight.detach().reshape(OUT, C).requires_grad_()
    y = low_precision_linear(wide, matrix, bias, how)
    leaves = (wide, matrix) if bias is None else (wide, matrix, bias)
    torch.manual_seed(5)
    gradient = torch.randn(y.movedim(-1, -1 - dims).shape).to(y.dtype).movedim(-1 - dims, -1)
    dx, dw, *db = torch.autograd.grad(y, leaves, gradient)
    return [y.detach().movedim(-1, -1 - dims), dx.movedim(-1, -1 - dims), dw.view(weight.shape), *db]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for got, want in zip(ours, theirs, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert torch.equal(got, want)


# -- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_it_has_the_bits_of_the_linear_layer(name: str, biased: bool, layout: str) -> None:
    x, weight, bias = tensors(2)
    how, leaves = products(name), (x, weight, bias) if biased else (x, weight)
    expected = as_linear(x, weight, bias if biased else None, how)
    if layout == "channels_last":
        leaves = (channels_last(x), channels_last(weight), *leaves[2:])
    y = conv1x1(*leaves[:2], bias if biased else None, how)
    assert_equal([y.detach(), *gradients(y, *leaves)], expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("batch", [2, None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_dimensions_with_a_batch_without_and_an_empty_one(
    dims: int, batch: int | None, dtype: torch.dtype
) -> None:
    x, weight, bias = tensors(dims, batch=batch, dtype=dtype)
    y = conv1x1(x, weight, bias, products())
    assert y.shape == PLAIN[dims](x.float(), weight, bias).shape
    dx, dw, db = gradients(y, x, weight, bias)
    assert_equal([y.detach(), dx, dw, db], as_linear(x, weight, bias, products()))
    assert (dx.dtype, dw.dtype) == (dtype, torch.float32)
    if batch == 0:
        assert not dw.any()
        assert not db.any()


def test_it_is_the_convolution_as_far_as_fp8_goes() -> None:
    x, weight, bias = tensors(2)
    y = conv1x1(x, weight, bias, products())
    exact = F.conv2d(x.double(), weight.double(), bias.double())
    ours, theirs = [y.detach(), *gradients(y, x, weight)], [exact.detach(), *gradients(exact, x, weight)]
    assert all(0.01 < float((got - want).norm() / want.norm()) < 0.06 for got, want in zip(ours, theirs, strict=True))


# -- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
def test_the_output_lies_in_memory_as_the_convolutions_does(dims: int, x_last: bool, weight_last: bool) -> None:
    x, weight, _ = tensors(dims, dtype=torch.bfloat16)
    if dims > 1:
        x, weight = (channels_last(x) if x_last else x), (channels_last(weight) if weight_last else weight)
    elif x_last:  # no format has a name for it, and the convolution gives contiguous memory
        x = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    for given in (x, x[0]):
        assert conv1x1(given, weight, None, products()).stride() == PLAIN[dims](given, weight.bfloat16()).stride()
    part = x[..., ::2]
    y = conv1x1(part, weight, None, products())
    assert y.is_contiguous() or y.stride() == PLAIN[dims](part, weight.bfloat16()).stride()


def test_what_follows_may_view_a_contiguous_output() -> None:
    x, weight, _ = tensors(2)
    assert conv1x1(x, weight, None, products()).view(2, -1).shape == (2, OUT * 15)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_the_gradient_of_the_weight_has_its_strides(layout: str) -> None:
    """Or fused optimizers take their slow way."""
    x, weight, _ = tensors(2)
    weight = channels_last(weight) if layout == "channels_last" else weight
    conv1x1(x, weight, None, products()).sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride() == ((C, 1, C, C) if layout == "channels_last" else (C, 1, 1, 1))


def test_channels_last_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither input, weight and output nor their gradients."""
    copies: list[Any] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
                copies.append((func, args[0].shape))
            return func(*args, **(kwargs or {}))

    x, weight, bias = tensors(2, dtype=torch.bfloat16)
    for given, count in (((channels_last(x), channels_last(weight)), 0), ((x, weight), 3)):
        copies.clear()
        with Watch():
            y = conv1x1(*given, bias, products())
            gradient = torch.empty_like(y).fill_(1.0)
            torch.autograd.grad(y, (*given, bias), gradient)
        own = [shape for _, shape in copies if len(shape) in (2, 4) and shape.numel() >= x.numel() // 2]
        assert len(own) == count


def test_a_linear_weight_is_a_matrix_already() -> None:
    weight = torch.randn(OUT, C)
    assert as_matrix(weight) is weight


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_an_activation_in_place_may_follow(layout: str) -> None:
    x, weight, bias = tensors(2)
    x = channels_last(x) if layout == "channels_last" else x
    y = conv1x1(x, weight, bias, products())
    assert type(y) is Tensor
    expected = gradients(y.relu(), x, weight, bias)
    assert_equal(gradients(conv1x1(x, weight, bias, products()).relu_(), x, weight, bias), expected)


def test_a_lazy_input_is_computed() -> None:
    x, matrix = torch.randn(2, 9, C).requires_grad_(), torch.randn(C, C).requires_grad_()
    weight = torch.randn(OUT, C, 1).requires_grad_()

    def run(*, lazily: bool) -> list[Tensor]:
        hidden = F.silu(low_precision_linear(x, matrix, None, products()))
        assert isinstance(hidden, Lazy)
        given = hidden if lazily else hidden.plain().detach().requires_grad_()
        y = conv1x1(given.transpose(1, 2), weight, None, products())
        return [y.detach(), *gradients(y, weight)]

    assert_equal(run(lazily=True), run(lazily=False))


# -- which convolutions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, None),
        ({"dilation": 3}, None),
        ({"padding": "same"}, None),
        ({"padding": "valid"}, None),
        ({"padding_mode": "circular"}, None),
        ({"bias": False}, None),
        ({"kernel_size": 3}, "kernel_size=(3, 3)"),
        ({"kernel_size": (1, 3)}, "kernel_size=(1, 3)"),
        ({"kernel_size": 3, "padding": "same"}, "kernel_size=(3, 3)"),
        ({"stride": 2}, "stride=(2, 2)"),
        ({"padding": 1}, "padding=(1, 1)"),
        ({"padding": (0, 1)}, "padding=(0, 1)"),
        ({"groups": 2}, "groups=2"),
    ],
)
def test_what_is_one_matrix_for_all_pixels(options: dict[str, Any], found: str | None) -> None:
    conv = nn.Conv2d(C, OUT, **{"kernel_size": 1, **options})
    assert obstacle(conv) == found
    if found is None:
        x = torch.randn(1, C, 4, 4)
        exact = conv(x)
        apply(model := nn.Sequential(conv), PrecisionPlan.of("fp32", {"0": "block"}), emulate=True)
        assert float((model(x) - exact).detach().norm() / exact.detach().norm()) < 0.06


@pytest.mark.parametrize(
    ("conv", "reason", "detail"),
    [
        (nn.Conv2d(C, C, 3), Reason.NO_KERNEL, "not in a Conv2d with kernel_size=(3, 3)"),
        (nn.Conv2d(C, C, 1, stride=2), Reason.NO_KERNEL, "not in a Conv2d with stride=(2, 2)"),
        (nn.Conv3d(C, C, 1, groups=C), Reason.NO_KERNEL, "not in a Conv3d with groups=128"),
        (nn.ConvTranspose2d(C, C, 1), Reason.NO_KERNEL, "not in ConvTranspose2d"),
        (nn.Conv2d(C, 24, 1), Reason.SHAPE, "its weight is [24, 128] and block takes multiples of 128"),
        (nn.Conv1d(3, C, 1), Reason.SHAPE, "its weight is [128, 3] and block takes multiples of 128"),
    ],
    ids=repr,
)
def test_others_fall_back_with_the_reason(conv: nn.Module, reason: Reason, detail: str) -> None:
    model = nn.Sequential(conv, nn.Conv2d(C, C, 1), nn.Linear(4, 4))
    plan = apply(model, "block", emulate=True)
    first, second, _ = plan.decisions
    assert (first.new, first.reason) == ("bf16", reason)
    assert detail in first.detail
    assert (second.new, second.reason) == ("block", Reason.EMULATED)
    assert second.evidence == {"quantise": "reference", "product": "reference"}


def test_a_convolution_with_a_forward_of_its_own_stays_one() -> None:
    conv = nn.Conv2d(C, C, 1)
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias) * 2  # type: ignore[method-assign]
    plan = apply(nn.Sequential(conv), PrecisionPlan.of("fp32", {"0": "block"}), emulate=True)
    assert (plan.decisions[0].new, plan.decisions[0].reason) == ("bf16", Reason.NO_KERNEL)
    assert "_conv_forward was replaced" in plan.decisions[0].detail


def test_under_emulation_it_is_multiplied_and_others_are_rounded() -> None:
    """In the recipe `tensor`, which both have: a product is what a device would compute."""
    model = nn.Sequential(
        nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 5, 1), nn.Conv2d(5, 16, 1, stride=2)
    )
    plan = apply(model, "tensor", emulate=True)
    assert {decision.reason for decision in plan.decisions} == {Reason.EMULATED}
    assert [unit.unit_precision.rounds for unit in model] == [False, True, True, True]
    assert ["multiplied in BF16" in decision.detail for decision in plan.decisions] == [False, True, True, True]
    x = torch.randn(2, 16, 4, 4)
    with autocast("cpu", "bf16"):
        assert torch.equal(model[0](x), conv1x1(x, model[0].weight, model[0].bias, products("tensor")))


def test_the_last_one_is_an_output_layer_unless_a_rule_names_it() -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1))
    for name in ("block", "tensor"):
        assert apply(model, name, emulate=True).decisions[1].reason is Reason.OUTPUT_LAYER
    assert apply(model, PrecisionPlan.of("block", {"1": "row"}), emulate=True).decisions[1].new == "row"


# -- as a unit --------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(C, OUT, 1), nn.ReLU(inplace=True), nn.Conv2d(OUT, C, 1, bias=False), nn.Flatten())


def pinned(name: str, base: str = "bf16") -> PrecisionPlan:
    return PrecisionPlan.of(base, {"0": name, "2": name})


def train(model: nn.Module, x: Tensor, base: str = "bf16") -> list[Tensor]:
    model.zero_grad()
    with autocast("cpu", base):
        loss = model(x).float().square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("name", NAMES)
def test_apply_and_revert_are_exact(name: str) -> None:
    model, x = network(), torch.randn(2, C, 3, 5)
    expected, attributes = train(model, x, "fp32"), [sorted(vars(module)) for module in model]
    strides = [parameter.stride() for parameter in model.parameters()]
    apply(model, PrecisionPlan.of("bf16", {"0": name, "2": name}), emulate=True)
    in_fp8 = train(model, x)
    assert not any(torch.equal(a, b) for a, b in zip(in_fp8, expected, strict=True))
    last = PrecisionPlan(base=RECIPES["bf16"], rules=pinned(name).rules, memory_format="channels_last")
    apply(model, last, emulate=True)
    assert_equal(train(model, x)[:1], in_fp8[:1])
    revert(model)
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Flatten]
    assert [sorted(vars(module)) for module in model] == attributes
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert_equal(train(model, x, "fp32"), expected)


def test_inside_an_fp32_model_the_output_is_fp32() -> None:
    model = network()
    apply(model, pinned("block", "fp32"), emulate=True)
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    train(model, torch.randn(2, C, 3, 5), "fp32")
    assert seen == [torch.float32]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(make: Any) -> None:
    model, x = network(), torch.randn(2, C, 3, 5)
    apply(model, pinned("row"), emulate=True)
    made = make(model)
    assert all(isinstance(made[i], Unit) for i in (0, 2))
    assert_equal(train(made, x), train(model, x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_compiled_code_gives_the_same_numbers(backend: str, layout: str, fresh_compiler: None) -> None:
    model, x = network(), torch.randn(2, C, 3, 5)
    if layout == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    model[3] = nn.Identity()
    apply(model, pinned("block"), emulate=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_equal(train(compiled, x), train(model, x))
    with autocast("cpu", "bf16"):
        assert compiled(x).stride() == model(x).stride()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, x = network(), torch.randn(2, C, 3, 5, requires_grad=True)
    apply(model, pinned("block"), emulate=True)
    expected = train(model, x)
    again = nn.Sequential(model)
    again.forward = lambda given: checkpoint(model, given, use_reentrant=reentrant)  # type: ignore[method-assign]
    assert_equal(train(again, x), expected)


def test_settings_changed_after_the_plan_are_an_error_and_not_ignored() -> None:
    model, x = network(), torch.randn(2, C, 4, 4)
    apply(model, pinned("block"), emulate=True)
    model[2].stride = (2, 2)
    with pytest.raises(ShapeError, match=r"Conv2d with stride=\(2, 2\), which it did not have.*apply the plan again"):
        model(x)
    apply(model, pinned("block"), emulate=True)
    with autocast("cpu", "bf16"):
        assert model(x).shape == (2, C * 4)


@pytest.mark.parametrize(
    ("x", "weight", "match"),
    [
        (torch.ones(2, 64, 3, 3), torch.ones(OUT, C, 1, 1), r"an input \[2, 64, 3, 3\] for .* \[256, 128, 1, 1\]"),
        (torch.ones(C, 3), torch.ones(OUT, C, 1, 1), "inputs of 3 or 4 dimensions with 128 channels"),
        (torch.ones(2, C, 3, 3), torch.ones(OUT, C, 3, 1), "weights that end in ones"),
        (torch.ones(2, C, 3, 3), torch.ones(40, C, 1, 1), "multiples of 128"),
        (torch.ones(2, C, 3, 3, dtype=torch.long), torch.ones(OUT, C, 1, 1), "torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, weight: Tensor, match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        conv1x1(x, weight, None, products())
