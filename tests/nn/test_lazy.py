"""Activations between FP8 layers: computed by the cast, or by whoever reads them first; never wrongly."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp import PrecisionPlan, autocast, convert
from deepseek_mp.monitor import PrecisionMonitor
from deepseek_mp.nn import functional
from deepseek_mp.nn.functional import Products, Scaling, UnitScaling, low_precision_linear
from deepseek_mp.nn.lazy import Lazy, Made, lazy, peeked, some_rows
from deepseek_mp.ops.sources import compute
from deepseek_mp.precision import RECIPES
from deepseek_mp.precision.recipe import Rounding
from deepseek_mp.trainer.replay import find_first_bad_module
from deepseek_mp.trainer.rng import get_rng
from deepseek_mp.trainer.window import MicroBatch

Linear = Callable[[Tensor, Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
RECIPE_NAMES = ("tensor", "row", "block", "mx", "delayed")
K, N = 128, 256


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each cast of an input or gradient reads: "values", or the name of a source."""
    seen: list[str] = []
    original = functional._quantised

    def watched(x: Tensor | Made, *args: Any) -> Any:
        seen.append(x.source if isinstance(x, Made) else "values")
        return original(x, *args)

    monkeypatch.setattr(functional, "_quantised", watched)
    return seen


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs with layers that return ordinary tensors."""

    def run(call: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(functional, "is_traced", lambda values: True)
            return call()

    return run


def products(name: str = "block") -> Products:
    return Products(recipe=RECIPES[name], quantise="reference", product="reference")


def fp8(name: str = "block") -> Linear:
    run = products(name)
    return lambda x, weight: low_precision_linear(x, weight, None, run)


def leaves() -> list[Tensor]:
    """x [2, 24, K], and the weights of gate, up and down."""
    torch.manual_seed(0)
    made = [torch.randn(2, 24, K), *(torch.randn(shape) / 12 for shape in ((N, K), (N, K), (K, N)))]
    return [tensor.requires_grad_() for tensor in made]


def gated(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def run(function: Callable[..., Tensor], linear: Linear, *, double: bool = False) -> list[Tensor]:
    """The result, then the gradients of the leaves that it depends on."""
    given = [leaf.detach().double().requires_grad_() for leaf in leaves()] if double else leaves()
    y = function(linear, *given)
    y.to(torch.promote_types(y.dtype, torch.float32)).square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in given if leaf.grad is not None)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """The same but for values that were rounded to BF16 in between, and FP8 values that this moved to the next.

    BF16 rounds by 2**-10 of a value, and values of FP8 are 2**-4 apart, so that one of some 50 moves, by as much.
    That is 2**-4 / 50**0.5 = 0.009 in each of up to four casts before a gradient, beside 0.04 that FP8 makes of each.
    """
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < 0.03


def assert_as_exact(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """No further from the exact results than without, which is as far as FP8 takes them."""
    for a, b, want in zip(ours, theirs, exact, strict=True):
        assert error(a, want) < 1.02 * error(b, want)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- what is handed over ---------------------------------------------------------------------------------


def test_a_gate_and_its_gradients_are_computed_by_the_casts(casts: list[str]) -> None:
    run(gated, fp8())
    assert sorted(casts) == ["silu_gate", "silu_gate", "silu_gate_grad"] + ["values"] * 6


def test_a_cast_that_rounds_stochastically_reads_values(casts: list[str]) -> None:
    recipe = RECIPES["block"]
    dgrad, wgrad = (
        replace(role, left=replace(role.left, rounding=Rounding.STOCHASTIC)) for role in (recipe.dgrad, recipe.wgrad)
    )
    by_chance = replace(recipe, dgrad=dgrad, wgrad=wgrad)
    how = Products(recipe=by_chance, quantise="reference", product="reference")
    run(gated, lambda x, weight: low_precision_linear(x, weight, None, how))
    assert sorted(casts) == ["silu_gate"] + ["values"] * 8


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_gradient_are_computed_by_the_casts(name: str, casts: list[str], plainly: Any) -> None:
    def between(linear: Linear, x: Tensor, up: Tensor, _: Tensor, down: Tensor) -> Tensor:
        return linear(ACTIVATIONS[name](linear(x, up)), down)

    ours = run(between, fp8())
    assert sorted(casts) == sorted([name, f"{name}_grad", *["values"] * 4])
    assert_as_exact(ours, plainly(lambda: run(between, fp8())), run(between, F.linear, double=True))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("swapped", [False, True])
def test_every_gate(name: str, swapped: bool, casts: list[str]) -> None:
    def either(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        a, b = ACTIVATIONS[name](linear(x, gate)), linear(x, up)
        return linear(b * a if swapped else a * b, down)

    run(either, fp8())
    assert casts.count(f"{name}_gate") == 2
    assert casts.count(f"{name}_gate_grad") == 1


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_the_numbers_are_as_near_to_the_exact_ones_as_without(recipe: str, plainly: Any) -> None:
    exact = run(gated, F.linear, double=True)
    ours, theirs = run(gated, fp8(recipe)), plainly(lambda: run(gated, fp8(recipe)))
    assert not torch.equal(ours[0], theirs[0])
    assert_as_exact(ours, theirs, exact)


def test_delayed_scales_are_used_and_their_maxima_noted(casts: list[str]) -> None:
    def scaling() -> UnitScaling:
        return UnitScaling(*(Scaling(torch.tensor(0.0), torch.tensor(0.0)) for _ in range(3)))

    scalings = [scaling() for _ in range(3)]
    chosen = iter(scalings)
    how = products("delayed")
    run(gated, lambda x, weight: low_precision_linear(x, weight, None, how, None, next(chosen)))
    gate, up, down = scalings
    with torch.no_grad():
        x, wg, wu, _ = leaves()
        a, b = fp8("tensor")(x, wg), fp8("tensor")(x, wu)
        hidden = compute("silu_gate", [a.flatten(0, 1), b.flatten(0, 1)])
    assert float(down.input.amax) == pytest.approx(float(hidden.abs().max()), rel=1e-6)
    assert all(float(s.grad_output.amax) > 0 for s in (gate, up, down))
    assert casts.count("silu_gate") == 2


def test_a_recipe_whose_casts_cannot_compute_gives_plain_tensors() -> None:
    for name, handed in (("row", False), ("tensor", False), ("row_gw_hp", False), ("block", True), ("delayed", True)):
        made = Products(recipe=RECIPES[name], quantise="triton", product="native")
        assert made.reads_promises is handed, name
    assert not products("row_gw_hp").reads_promises


def test_the_gradient_of_a_layer_with_a_bias_has_values(casts: list[str]) -> None:
    bias = torch.zeros(N, requires_grad=True)
    x, up, _, down = leaves()
    how = products()
    y = low_precision_linear(F.gelu(low_precision_linear(x, up, bias, how)), down, None, how)
    y.float().square().sum().backward()
    assert "gelu" in casts
    assert "gelu_grad" not in casts
    plain = [bias.grad.clone()]
    assert plain[0].abs().sum() > 0


def test_relu_s_gradient_needs_its_argument_only() -> None:
    x, up, _, down = leaves()
    hidden = F.relu(fp8()(x, up))
    fp8()(hidden, down).float().square().sum().backward()
    assert hidden.promise.values is None


def test_another_threshold_is_not_relu_s() -> None:
    g, x = torch.randn(2, 4, 32).bfloat16().unbind()
    backward = torch.ops.aten.threshold_backward
    assert backward(lazy(g), lazy(x), 0).promise.made_of().source == "relu_grad"
    other = backward(lazy(g), lazy(x), 0.5)
    assert other.promise.made_of() is None
    assert torch.equal(other + 0, backward(g, x, 0.5))


def test_nothing_is_stored_for_backward_but_what_layers_gave() -> None:
    kept: list[Tensor] = []
    x, gate, up, down = leaves()
    linear = fp8()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated(linear, x, gate, up, down)
    put_off = [tensor for tensor in kept if isinstance(tensor, Lazy) and tensor.promise.values is None]
    assert [tensor.promise.activation() for tensor in put_off] == ["silu"]


# -- other readers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        lambda y: y.float().sum(),
        lambda y: y[0].float().sum(),
        lambda y: torch.cat([y, y]).float().sum(),
        lambda y: y.transpose(0, 1).contiguous().float().sum(),
        lambda y: (y.detach() * y).float().sum(),
        lambda y: (y * y).float().sum(),
        lambda y: F.silu(y).float().sum(),
        lambda y: F.dropout(y, 0.0, training=True).float().sum(),
        lambda y: torch.stack(list(y.unbind())).float().mean(),
        lambda y: torch.einsum("btn,btn->", y, y),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_second_reader_sees_the_values(other: Callable[[Tensor], Tensor], first: bool, plainly: Any) -> None:
    def twice(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = F.silu(linear(x, gate)) * linear(x, up)
        seen = other(hidden) if first else 0.0
        return linear(hidden, down).float() + (seen if first else other(hidden))

    ours, theirs = run(twice, fp8()), plainly(lambda: run(twice, fp8()))
    assert_close(ours, theirs)
    if first:  # whatever is read before the cast is computed as ever
        assert torch.equal(ours[0], theirs[0])


def test_a_gate_that_is_expanded_has_values(casts: list[str], plainly: Any) -> None:
    def expanded(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return linear(F.silu(linear(x[0], gate)) * linear(x, up), down)

    ours = run(expanded, fp8())
    assert set(casts) == {"values"}
    assert_equal(ours, plainly(lambda: run(expanded, fp8())))


def test_two_layers_read_one_activation(casts: list[str], plainly: Any) -> None:
    def both(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = F.gelu(linear(x, gate)) * linear(x, up)
        return linear(hidden, down) + linear(hidden, down * 2)

    ours = run(both, fp8())
    assert casts.count("gelu_gate") == 2  # their gradients are added up, and so have values
    assert_close(ours, plainly(lambda: run(both, fp8())))


def test_values_are_computed_once_and_as_the_operation_computes_them() -> None:
    x = torch.randn(4, 32).bfloat16()
    y = F.silu(lazy(x))
    assert isinstance(y, Lazy)
    assert y.promise.values is None
    assert torch.equal(y + 0, F.silu(x))
    first = y.promise.values
    assert torch.equal(y * 1, F.silu(x))
    assert y.promise.values is first
    assert y.promise.made_of() is None


def test_a_peek_sees_the_values_and_leaves_no_trace() -> None:
    gate, up = lazy(torch.randn(4, 8)), lazy(torch.randn(4, 8))
    expected = F.silu(gate.promise.keep()) * up.promise.keep()
    made = F.silu(gate) * up
    assert isinstance(made, Lazy)
    for _ in range(2):
        seen = peeked(made)
        assert type(seen) is Tensor
        assert torch.equal(seen, expected)
        assert made.promise.values is None
        assert made.promise.made_of() is not None  # a cast can still compute it
    plain = torch.ones(2, requires_grad=True)
    assert not peeked(plain).requires_grad
    assert peeked(plain).data_ptr() == plain.data_ptr()
    assert torch.equal(peeked(gate), gate)


def test_hooks_on_modules_and_tensors(plainly: Any) -> None:
    def hooked(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        a = linear(x, gate)
        hidden = F.silu(a) * linear(x, up)
        a.register_hook(lambda g: g * 2)
        hidden.register_hook(lambda g: g.clone() * 0.5)
        hidden.retain_grad()
        y = linear(hidden, down)
        kept.append(hidden)
        return y

    kept: list[Tensor] = []
    ours, theirs = run(hooked, fp8()), plainly(lambda: run(hooked, fp8()))
    assert_close(ours, theirs)
    assert type(kept[0].grad) is Tensor
    assert_close([kept[0].grad], [kept[1].grad])


def test_gradients_changed_in_place_by_a_hook(plainly: Any) -> None:
    def hooked(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = F.silu(linear(x, gate)) * linear(x, up)
        hidden.register_hook(lambda g: g.mul_(3))
        return linear(hidden, down)

    assert_close(run(hooked, fp8()), plainly(lambda: run(hooked, fp8())))


def test_full_backward_hooks_see_tensors(plainly: Any) -> None:
    seen: list[float] = []

    def gradients(module: nn.Module, given: Any, received: Any) -> None:
        seen.append(float(received[0].abs().sum()))

    def training() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(K, N, bias=False), nn.GELU(), nn.Linear(N, K, bias=False))
        convert(model, PrecisionPlan.of("block", pin={"2": "block"}), emulate=True)
        for module in model:
            module.register_full_backward_hook(gradients)
        model(torch.randn(32, K)).float().square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    ours = training()
    assert len(seen) == 3
    assert all(seen)
    assert_close(ours, plainly(training))


# -- changes in place ------------------------------------------------------------------------------------


def changed(when: str) -> Callable[..., Tensor]:
    def function(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        # relu keeps its result and not its argument, so autograd lets the argument change.
        before = linear(x, gate)
        view = before[0] if when == "a view from before" else None
        hidden = F.relu(before)
        if when == "itself":
            before.add_(1)
        elif when == "a view":
            before[0].add_(1)
        elif when == "its detached self":
            before.detach().mul_(2)
        elif when == "its data":
            before.data.mul_(2)
        elif when == "without gradients":
            with torch.no_grad():
                before.mul_(3)
        elif when == "the activation":
            hidden = hidden * 1
            hidden.mul_(2)
        elif when == "several":
            torch._foreach_mul_([before.detach()], 2.0)
        elif when == "written to":
            before.detach().copy_(hidden * 2)
        elif when == "out":
            torch.mul(hidden.detach(), 2, out=before.detach())
        elif view is not None:
            view.add_(1)
        return linear(hidden, down).float() + before.float().sum()

    return function


@pytest.mark.parametrize(
    "when",
    ["itself", "a view", "a view from before", "its detached self", "its data", "without gradients", "the activation",
     "several", "written to", "out"],
)  # fmt: skip
def test_what_reads_a_tensor_reads_it_as_it_was(when: str, plainly: Any) -> None:
    ours, theirs = run(changed(when), fp8()), plainly(lambda: run(changed(when), fp8()))
    assert_equal(ours[:1], theirs[:1])
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["relu", "silu", "leaky_relu"])
def test_activations_in_place(name: str, plainly: Any) -> None:
    def between(linear: Linear, x: Tensor, up: Tensor, _: Tensor, down: Tensor) -> Tensor:
        return linear(getattr(F, name)(linear(x, up), inplace=True), down)

    assert_close(run(between, fp8()), plainly(lambda: run(between, fp8())))


def test_a_change_that_autograd_forbids_is_still_found() -> None:
    x, gate, _, down = leaves()
    linear = fp8()
    before = linear(x, gate)
    y = linear(F.silu(before), down)
    before.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def _double(x: Tensor) -> None:
    x.mul_(2)


def test_operations_of_others_may_write_without_a_word() -> None:
    library = torch.library.Library("test_lazy", "DEF")
    library.define("reduce(Tensor x) -> ()")  # as torch.distributed declares its collectives
    library.impl("reduce", _double, "CompositeExplicitAutograd")
    x = torch.randn(4, 32).bfloat16()
    one = lazy(x.clone())
    before = F.relu(one)
    torch.ops.test_lazy.reduce(one)
    assert torch.equal(before + 0, F.relu(x))
    assert torch.equal(F.relu(one) + 0, F.relu(2 * x))


def test_a_tensor_that_was_transposed_in_place() -> None:
    x = torch.randn(4, 32).bfloat16()
    one = lazy(x.clone())
    other, y = one.detach(), F.silu(one)
    one.t_()
    assert (one.shape, (one + 0).shape, other.shape, (other + 0).shape) == ((32, 4), (32, 4), (4, 32), (4, 32))
    one.mul_(2)
    assert torch.equal(other + 0, 2 * x)
    assert torch.equal(F.silu(one) + 0, F.silu(2 * x).t())
    assert torch.equal(y + 0, F.silu(x))


# -- among PyTorch's other parts -------------------------------------------------------------------------


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    given = leaves()
    loss = gated(fp8(), *given).float().square().sum()
    first = torch.autograd.grad(loss, given, retain_graph=True)
    assert_equal(list(torch.autograd.grad(loss, given)), list(first))
    assert all(type(gradient) is Tensor for gradient in first)


def test_gradients_are_plain_tensors_and_add_up() -> None:
    given = leaves()
    for _ in range(2):
        gated(fp8(), *given).float().square().sum().backward()
    assert all(type(leaf.grad) is Tensor for leaf in given)
    once = run(gated, fp8())
    assert all(torch.allclose(leaf.grad, 2 * g, rtol=1e-6) for leaf, g in zip(given, once[1:], strict=True))


def test_a_second_derivative_is_refused() -> None:
    x, gate, up, down = leaves()
    y = gated(fp8(), x, gate, up, down)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["all", "activation", "layer"])
def test_checkpointing(reentrant: bool, part: str, plainly: Any, casts: list[str]) -> None:
    """The first forward of a reentrant checkpoint has no gradients and hands nothing over; so close, not equal."""

    def recomputed(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        def again(function: Any, *args: Tensor) -> Tensor:
            return checkpoint(function, *args, use_reentrant=reentrant)

        if part == "all":
            return again(lambda *args: gated(linear, *args), x, gate, up, down)
        a, b = (again(linear, x, w) if part == "layer" else linear(x, w) for w in (gate, up))
        hidden = again(lambda a, b: F.silu(a) * b, a, b) if part == "activation" else F.silu(a) * b
        return linear(hidden, down)

    ours = run(recomputed, fp8())
    assert "silu_gate" in casts or reentrant
    assert_close(ours, run(gated, fp8()))
    assert_close(ours, plainly(lambda: run(recomputed, fp8())))
    if not reentrant:
        assert_equal(ours, run(gated, fp8()))


def test_saved_tensors_on_the_host(plainly: Any) -> None:
    def saved(linear: Linear, *args: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return gated(linear, *args)

    assert_close(run(saved, fp8()), plainly(lambda: run(saved, fp8())))


def test_regions_change_nothing(casts: list[str]) -> None:
    def region(linear: Linear, *args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return gated(linear, *args)

    assert_equal(run(region, fp8()), run(gated, fp8()))
    assert casts.count("silu_gate_grad") == 2


def test_without_gradients_layers_return_plain_tensors() -> None:
    x, gate, up, down = leaves()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert type(gated(fp8(), x, gate, up, down)) is Tensor
    a = fp8()(x, gate)
    with torch.no_grad():
        assert type(fp8()(F.silu(a), down)) is Tensor


def test_read_first_in_inference_mode_and_then_trained_with() -> None:
    x, gate, _, down = leaves()
    hidden = F.gelu(fp8()(x, gate))
    with torch.inference_mode():
        assert float(hidden.float().norm()) > 0
    assert not hidden.promise.values.is_inference()
    hidden.add_(1)
    fp8()(hidden, down).float().sum().backward()
    assert gate.grad is not None


@pytest.mark.parametrize("kind", ["layer", "activation"])
def test_it_is_used_as_any_tensor_is(kind: str) -> None:
    x = torch.randn(4, 32).bfloat16()

    def made() -> Tensor:
        return lazy(x.clone()) if kind == "layer" else F.relu(lazy(x.clone()))

    want = x if kind == "layer" else F.relu(x)
    y = made()
    assert isinstance(y, Tensor)
    assert (y.shape, y.dtype, y.device.type, y.is_contiguous()) == (x.shape, torch.bfloat16, "cpu", True)
    assert repr(made()) == repr(want)
    assert f"{made()[0, 0]:.3f}" == f"{want[0, 0]:.3f}"
    assert made().tolist() == want.tolist()
    assert float(made()[1, 2]) == made()[1, 2].item() == want[1, 2].item()
    assert np.array_equal(made().float().numpy(), want.float().numpy())
    assert np.array_equal(lazy(x.float()).numpy(), x.float().numpy())
    assert np.array_equal(np.asarray(F.relu(lazy(x.float()))), F.relu(x.float()).numpy())
    assert torch.equal(torch.from_dlpack(made()), want)
    assert y.data_ptr() == y.untyped_storage().data_ptr() == y.plain().data_ptr() != 0
    assert type(y + 0) is Tensor
    stored = io.BytesIO()
    torch.save(made(), stored)
    stored.seek(0)
    copies = (copy.deepcopy(made()), copy.copy(made()), pickle.loads(pickle.dumps(made())), torch.load(stored))
    assert all(type(copied) is Tensor and torch.equal(copied, want) for copied in copies)
    assert torch.equal(torch.vmap(lambda row: row * 2)(made()), want * 2)
    assert torch.equal(made().share_memory_() + 0, want)


def test_a_copy_or_array_of_what_has_a_graph_is_refused_as_ever() -> None:
    x, gate, *_ = leaves()
    hidden = F.silu(fp8()(x, gate))
    assert "grad_fn=<SiluBackward0>" in repr(hidden)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(hidden)
    with pytest.raises(RuntimeError, match="requires grad"):
        hidden.numpy()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_takes_the_values(backend: str, fresh_compiler: None, plainly: Any) -> None:
    compiled = torch.compile(lambda a, b: F.silu(a) * b, backend=backend, fullgraph=True)
    assert type(compiled(*(lazy(torch.randn(4, 32)) for _ in range(2)))) is Tensor

    def partly(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return linear(compiled(linear(x, gate), F.relu(linear(x, up))), down)

    assert_close(run(partly, fp8()), plainly(lambda: run(partly, fp8())))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_after_one_that_is_not(backend: str, fresh_compiler: None) -> None:
    compiled = torch.compile(lambda x, weight: F.relu(fp8()(x, weight)), backend=backend, fullgraph=True)
    for activation in (F.silu, F.gelu, lambda x: x, F.silu):

        def before(linear: Linear, x: Tensor, gate: Tensor, _: Tensor, down: Tensor) -> Tensor:
            return compiled(activation(linear(x, gate)), down)  # noqa: B023 - called in this turn

        def same(linear: Linear, x: Tensor, gate: Tensor, _: Tensor, down: Tensor) -> Tensor:
            return F.relu(linear(activation(linear(x, gate)) + 0, down))  # noqa: B023

        assert_equal(run(before, fp8()), run(same, fp8()))


def test_traced_code_sees_plain_tensors() -> None:
    x, gate = (leaf.detach() for leaf in leaves()[:2])
    x.requires_grad_()
    traced = torch.jit.trace(lambda x: F.silu(fp8()(x, gate)), x, check_trace=False)
    assert torch.equal(traced(x), F.silu(fp8()(x, gate)))


# -- among the parts of this package ---------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((K, N), (K, N), (N, K)))
        self.head = nn.Linear(K, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.silu(self.gate(x)) * self.up(x)))


def step(model: nn.Module, x: Tensor) -> Tensor:
    with autocast(torch.device("cpu"), "bf16"):
        loss = model(x).float().square().mean()
    loss.backward()
    return loss


def converted() -> Gated:
    torch.manual_seed(0)
    model = Gated()
    convert(model, "block", emulate=True)
    return model


def test_a_model_of_units_hands_over_and_copies_do(casts: list[str]) -> None:
    model, x = converted(), torch.randn(4, 8, K)
    step(copy.deepcopy(model), x)
    assert casts.count("silu_gate") == 2


def test_the_monitor_counts_what_ran(plainly: Any) -> None:
    def counted() -> dict[str, Any]:
        model = converted()
        with PrecisionMonitor(model, sample_every=None) as monitor:
            with monitor.sample():
                step(model, torch.randn(4, 8, K))
            return monitor.log_precision_usage().layers

    ours, theirs = counted(), plainly(counted)
    for layer in ("gate", "up", "down", "head"):
        for op in ("deepseek_mp::product", "linear", "mm", "t"):
            assert ours[layer].get(op) == theirs[layer].get(op), (layer, op)
        assert ours[layer].get("cast") == theirs[layer].get("cast"), layer
    assert ours["down"]["deepseek_mp::product"]["fp8_e4m3"].total == 3
    activations = [
        {op for layer in found.values() for op in layer} & {"silu", "silu_backward"} for found in (ours, theirs)
    ]
    assert activations == [set(), {"silu", "silu_backward"}]


def test_flops_are_counted_as_without(plainly: Any) -> None:
    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            step(converted(), torch.randn(4, 8, K))
        return counter.get_total_flops()

    assert counted() == plainly(counted) > 0


def test_a_module_that_makes_infinities_is_found() -> None:
    model, x = converted(), torch.randn(4, 8, K)
    with torch.no_grad():
        model.up.weight[3, 5] = float("nan")
    entry = MicroBatch(index=0, batch=x, rng=get_rng(torch.device("cpu")))
    assert find_first_bad_module(model, [entry], lambda given: step(model, given.batch), torch.device("cpu")) == "up"


def hooked(linear: Linear, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.silu(linear(x, gate))
    hidden.register_hook(lambda g: g * 2)
    return linear(hidden, down)


SCALED: dict[str, Callable[..., Tensor]] = {
    "output": lambda linear, x, gate, up, down: linear(linear(x, gate) * 0.5, down),
    "activation": lambda linear, x, gate, up, down: linear(F.silu(linear(x, gate) * 1.702), down),
    "gate": lambda linear, x, gate, up, down: linear(F.silu(linear(x, gate)) * linear(x, up) * 0.5, down),
    "by a whole number": lambda linear, x, gate, up, down: linear(2 * F.silu(linear(x, gate)), down),
    "in place": lambda linear, x, gate, up, down: linear(F.silu(linear(x, gate)).mul_(0.5), down),
    "by a tensor": lambda linear, x, gate, up, down: linear(F.silu(linear(x, gate)) * torch.tensor(0.5), down),
    "in a hook": hooked,
}


@pytest.mark.parametrize("name", SCALED)
def test_what_is_scaled_is_computed_as_without(name: str, plainly: Any) -> None:
    assert_close(run(SCALED[name], fp8()), plainly(lambda: run(SCALED[name], fp8())))


@pytest.mark.parametrize("activated", [False, True])
def test_data_is_an_ordinary_tensor_and_can_be_replaced(activated: bool) -> None:
    linear, (x, gate, *_) = fp8(), leaves()
    y = linear(x, gate)
    y = F.silu(y) if activated else y
    expected = y.clone()
    assert type(y.data) is Tensor
    other = torch.zeros(())
    other.data = y.data
    assert torch.equal(other + 0, expected)
    y.data = torch.ones(3, 4, dtype=y.dtype)
    assert y.shape == (3, 4)
    assert torch.equal(F.silu(y), F.silu(torch.ones(3, 4, dtype=y.dtype)))


@pytest.mark.parametrize("activated", [False, True])
def test_out_gives_an_output_of_a_layer_the_shape_that_it_needs(activated: bool) -> None:
    linear, (x, gate, *_) = fp8(), leaves()
    y = linear(x, gate).detach()
    y = F.silu(y) if activated else y
    with pytest.warns(UserWarning, match="resized"):
        torch.add(torch.ones(3, 4), 1, out=y)
    assert y.shape == (3, 4)
    assert torch.equal(y + 0, torch.full((3, 4), 2.0, dtype=y.dtype))


def test_what_is_gone_is_forgotten() -> None:
    linear, (x, gate, *_) = fp8(), leaves()
    y = linear(x, gate)
    for _ in range(50):
        F.silu(y)
    assert len(y.promise.followers) < 3  # type: ignore[attr-defined]


def test_some_rows_of_what_was_put_off_are_computed_alone() -> None:
    a, b = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    hidden = F.silu(lazy(a)) * lazy(b)
    torch.testing.assert_close(some_rows(hidden, 3), (F.silu(a) * b).view(10, 16)[::3])
    assert isinstance(hidden, Lazy)
    assert hidden.promise.values is None, "it is still to be computed"
    assert torch.equal(some_rows(lazy(a), 4), a.view(10, 16)[::4])
    assert torch.equal(some_rows(a.requires_grad_(), 4), a.detach().view(10, 16)[::4])
    assert not some_rows(a, 4).requires_grad
