"""Scales from past steps: what they are, when they are not used, and where their state is and is not."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek_mp.errors import PlanError
from deepseek_mp.nn import apply, functional, revert, saturated_tensors, update_scales
from deepseek_mp.nn.delayed import HEADROOM, HISTORY, DelayedScales, place_scales, scales_of
from deepseek_mp.nn.held import HeldWeights
from deepseek_mp.precision import RECIPES, Operand, PrecisionPlan, Recipe, with_power_of_two


def make(recipe: str | Recipe = "delayed") -> nn.Sequential:
    """Two layers in the recipe and an output layer that is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 16))
    apply(model, PrecisionPlan.of(recipe), emulate=True)
    return model


def batch(seed: int = 0) -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output and gradients, of x too; scales are not updated."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = (call or model)(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *model.parameters()])]


def state(model: nn.Module) -> DelayedScales:
    (scales,) = scales_of(model)
    return scales


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def tensors_of(model: nn.Module, x: Tensor) -> list[float]:
    """The largest magnitudes of input, weight and output gradient of the first layer, in an ordinary step."""
    seen: dict[str, Tensor] = {}
    handle = model[0].register_full_backward_hook(lambda module, into, out: seen.update(gradient=out[0]))
    step(model, x)
    handle.remove()
    return [float(t.abs().max()) for t in (x, model[0].weight.detach(), seen["gradient"])]


# -- the scales ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [RECIPES["delayed"], with_power_of_two(RECIPES["delayed"])], ids=str)
def test_the_first_step_is_that_of_scales_from_the_tensors_themselves(recipe: Recipe) -> None:
    current = replace(recipe, name="by the tensor itself", **{
        role: replace(part, left=replace(part.left, rule="current"), right=replace(part.right, rule="current"))
        for role, part in (("fprop", recipe.fprop), ("dgrad", recipe.dgrad), ("wgrad", recipe.wgrad))
    })  # fmt: skip
    assert equal(step(make(recipe), batch()), step(make(current), batch()))


@pytest.mark.parametrize("recipe", [RECIPES["delayed"], with_power_of_two(RECIPES["delayed"])], ids=str)
def test_a_history_with_the_same_maximum_gives_the_numbers_of_tensor(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit without headroom, which only moves the smallest values."""
    monkeypatch.setattr("deepseek_mp.nn.delayed.HEADROOM", 1.0)
    model = make(recipe)
    first = step(model, batch())
    update_scales(model)
    assert (state(model).top > 0).all()
    assert equal(step(model, batch()), first)
    update_scales(model)
    assert not state(model).grown.any()


def test_headroom_changes_no_value_that_does_not_vanish() -> None:
    x = (torch.rand(32, 64) + 0.1) * torch.randn(32, 64).sign()
    layer = nn.Sequential(nn.Linear(64, 48))
    with torch.no_grad():
        layer[0].weight.copy_((torch.rand(48, 64) + 0.1) * torch.randn(48, 64).sign())
    apply(layer, PrecisionPlan.of("bf16", {"0": "delayed"}), emulate=True)
    gradient = ((torch.rand(32, 48) + 0.1) * torch.randn(32, 48).sign()).bfloat16()
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], gradient)])
        update_scales(layer)
    assert equal(*results)


def test_top_is_the_largest_of_the_history_with_headroom() -> None:
    model = make()
    seen = []
    for seed in range(3):
        x = batch(seed) * (1 + 0.2 * (seed % 2))
        seen.append(tensors_of(model, x))
        update_scales(model)
    want = HEADROOM * torch.tensor(seen).amax(0)
    assert torch.equal(state(model).top[:3], want)
    assert torch.equal(state(model).history[:3, :3], torch.tensor(seen).flip(0))
    assert not torch.stack(state(model).amax).any()


def test_a_spike_is_forgotten_after_the_history() -> None:
    model = make()
    tops = []
    for index in range(HISTORY + 2):
        step(model, batch() * (1.9 if index == 0 else 1.0))
        update_scales(model)
        tops.append(float(state(model).top[0]))
    own = HEADROOM * float(batch().abs().max())
    assert tops[:HISTORY] == pytest.approx([1.9 * own] * HISTORY)
    assert tops[HISTORY:] == [own] * 2


def test_a_tensor_that_grows_a_hundredfold_is_cut_once_counted_and_then_scaled_by_itself() -> None:
    model, plain = make(), make("tensor")
    step(model, batch())
    update_scales(model)
    cut = step(model, 100 * batch())
    assert (cut[0].float() - step(plain, 100 * batch())[0].float()).abs().max() > 1
    update_scales(model)
    found = saturated_tensors(model)
    assert [one[1:] for one in found if one.layer == "0" and one.operand == Operand.INPUT] == [(Operand.INPUT, 1)]
    tops = []
    for _ in range(HISTORY):
        tops.append(float(state(model).top[0]))
        got = step(model, 100 * batch())
        update_scales(model)
    assert tops == [0.0] * HISTORY
    assert saturated_tensors(model)[0].steps == 1
    assert state(model).top[0] == HEADROOM * float((100 * batch()).abs().max())
    want = step(plain, 100 * batch())[0].float()
    assert (got[0].float() - want).abs().max() < 0.05 * want.abs().max()  # later layers may be within their headroom


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_seen_and_not_remembered(bad: float) -> None:
    model = make()
    for seed in range(2):
        x = batch(seed)
        x[3, 5] = bad
        y = step(model, x)[0]
        assert y[3].isnan().all()
        update_scales(model)
    clean = [batch(seed) for seed in range(2)]
    for x in clean:
        x[3, 5] = 0
    assert state(model).top[0] == HEADROOM * max(float(x.abs().max()) for x in clean)
    assert state(model).top.isfinite().all()


def test_zeros_and_tensors_that_were_not_there_leave_the_scale_unknown() -> None:
    model = make()
    step(model, torch.zeros(32, 64))
    update_scales(model)
    assert state(model).top[0] == 0
    assert state(model).top[1] > 0
    for _ in range(HISTORY):
        update_scales(model)
    assert not state(model).top.any()


def test_maxima_beyond_the_range_of_fp32_leave_the_scale_unknown() -> None:
    model = make()
    state(model).amax[0].fill_(3e38)
    update_scales(model)
    assert state(model).top[0] == 0


def test_one_operand_may_have_two_formats_and_a_product_other_scales() -> None:
    delayed, row = RECIPES["delayed"], RECIPES["row"]
    mixed = replace(delayed, name="mixed", wgrad=replace(delayed.wgrad, right=delayed.dgrad.left), dgrad=row.dgrad)
    model = make(mixed)
    for seed in range(3):
        assert all(t.isfinite().all() for t in step(model, batch(seed)))
        update_scales(model)
    assert (state(model).top > 0).all()


# -- among PyTorch's other parts -------------------------------------------------------------------------


def test_eval_mode_scales_by_the_tensors_themselves_and_leaves_no_trace() -> None:
    model = make()
    step(model, batch())
    update_scales(model)
    model.eval()
    x = 1000 * batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), make("tensor")(x))
    assert not torch.stack(state(model).amax).any()


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations have BF16 values: as in compiled code before Inductor, and in a forward without gradients."""
    monkeypatch.setattr(functional, "is_traced", lambda values: True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_1x1_convolutions_have_the_scales_of_linear_layers(layout: torch.memory_format, plainly: None) -> None:
    linear = make()
    convolving = nn.Sequential(nn.Conv2d(64, 48, 1), nn.GELU(), nn.Conv2d(48, 64, 1), nn.GELU(), nn.Conv2d(64, 16, 1))
    convolving.load_state_dict(
        {name: p.view(*p.shape, 1, 1) if p.dim() == 2 else p for name, p in linear.state_dict().items()}
    )
    convolving = convolving.to(memory_format=layout)
    apply(convolving, PrecisionPlan.of("delayed"), emulate=True)
    for seed in range(3):
        rows = batch(seed)
        pixels = rows.view(2, 4, 4, 64).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        expected, got = step(linear, rows), step(convolving, pixels)
        assert torch.equal(got[0].permute(0, 2, 3, 1).reshape(32, 16), expected[0])
        for a, b in zip(got[2:], expected[2:], strict=True):
            assert torch.equal(a.flatten(1) if a.dim() > 1 else a, b)
        for model in (linear, convolving):
            update_scales(model)
        ours, theirs = state(convolving).tensors(), state(linear).tensors()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert (ours["0/top"] > 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_gives_the_same_gradients_and_maxima(reentrant: bool, request: pytest.FixtureRequest) -> None:
    if reentrant:
        request.getfixturevalue("plainly")
    model, other = make(), make()
    for seed in range(3):
        want = step(model, batch(seed))
        got = step(other, batch(seed), lambda x: checkpoint(other, x, use_reentrant=reentrant)) if not reentrant else (
            _reentrant(other, batch(seed))
        )  # fmt: skip
        assert equal(got, want)
        assert equal(state(other).amax, state(model).amax)
        update_scales(model)
        update_scales(other)


def _reentrant(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As `step`, by the one way in which reentrant checkpoints can be differentiated."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(model, x, use_reentrant=True)
    y.float().square().mean().backward()
    return [y.detach(), *(leaf.grad for leaf in (x, *model.parameters()))]  # type: ignore[misc]


def test_compiled_code_gives_the_numbers_and_maxima_of_eager_code(plainly: None, fresh_compiler: None) -> None:
    model, other = make(), make()
    graphs: list[Any] = []
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        x = batch(seed) * (100 if seed == 2 else 1)
        assert equal(step(other, x, compiled), step(model, x))
        assert equal(state(other).amax, state(model).amax)
        assert all(amax > 0 for amax in state(other).amax)
        update_scales(model)
        update_scales(other)
        assert torch.equal(state(model).top, state(other).top)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1] * 4
    assert saturated_tensors(model) == saturated_tensors(other) != []


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_quantised_once_have_the_scale_of_the_step(compiled: bool, plainly: None, fresh_compiler: None) -> None:
    model, other = make(), make()
    call = torch.compile(other, backend="aot_eager", fullgraph=True) if compiled else other
    held = HeldWeights(other)
    for seed in range(3):
        with held.lent(seed):
            for part in range(2):
                assert equal(step(other, batch(10 * seed + part), call), step(model, batch(10 * seed + part)))
        assert equal(state(other).amax, state(model).amax)
        held.drop()
        update_scales(model)
        update_scales(other)


# -- where the state is ----------------------------------------------------------------------------------


@pytest.fixture
def trained() -> Iterator[nn.Sequential]:
    model = make()
    step(model, batch())
    update_scales(model)
    yield model
    revert(model)


def test_the_state_is_no_part_of_the_model_s_and_reverting_removes_it(trained: nn.Sequential) -> None:
    plain = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 16))
    assert trained.state_dict().keys() == plain.state_dict().keys()
    assert len(list(trained.parameters())) == len(list(plain.parameters()))
    assert not list(trained.buffers())
    revert(trained)
    assert [vars(module).keys() for module in trained.modules()] == [vars(module).keys() for module in plain.modules()]
    update_scales(trained)  # nothing to do
    assert saturated_tensors(trained) == []


def test_the_same_plan_again_keeps_the_scales_and_another_drops_them(trained: nn.Sequential) -> None:
    before = state(trained)
    apply(trained, "delayed", emulate=True)
    assert state(trained) is before
    apply(trained, PrecisionPlan.of("delayed", {"0": "bf16"}), emulate=True)
    assert list(state(trained).units) == ["2"]
    assert not state(trained).top.any()
    assert "delayed_scaling" not in vars(trained[0])
    apply(trained, "tensor", emulate=True)
    assert scales_of(trained) == []
    assert all("delayed_scaling" not in vars(module) for module in trained.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_scale_by_the_tensors_themselves_until_a_plan_is_applied(
    copied: Callable[[nn.Module], nn.Module], trained: nn.Sequential
) -> None:
    other = copied(trained)
    assert scales_of(other) == []
    assert all("delayed_scaling" not in vars(module) for module in other.modules())
    before = torch.stack(state(trained).amax)
    assert equal(step(other, 100 * batch()), step(make("tensor"), 100 * batch()))
    assert torch.equal(torch.stack(state(trained).amax), before)
    with pytest.raises(PlanError, match="apply the plan again"):
        update_scales(other)
    apply(other, "delayed", emulate=True)
    step(other, batch())
    update_scales(other)
    assert (state(other).top > 0).all()


def test_a_wrapper_or_a_part_of_the_model_is_not_taken_for_it(trained: nn.Sequential) -> None:
    for wrong in (nn.ModuleList([trained]), trained[0]):
        with pytest.raises(PlanError, match=r"whose layers have delayed scales that are kept elsewhere.*very module"):
            update_scales(wrong)
        with pytest.raises(PlanError, match="kept elsewhere"):
            saturated_tensors(wrong)


def test_a_model_that_moved_gets_its_state_where_it_is_now(trained: nn.Sequential) -> None:
    assert place_scales(trained) == [state(trained)]
    before = state(trained)
    trained.to("meta")
    (scales,) = place_scales(trained)
    assert scales is not before
    assert {tensor.device.type for tensor in (*scales.amax, scales.top, scales.history)} == {"meta"}


def test_saved_tensors_continue_another_model(trained: nn.Sequential) -> None:
    state(trained).amax[0].fill_(7.0)  # within a step
    saved = {name: tensor.clone() for name, tensor in state(trained).tensors().items()}
    other = make()
    state(other).load(saved)
    assert equal(list(state(other).tensors().values()), list(saved.values()))
    assert other[0].delayed_scaling.input.amax == 7.0
    assert other[0].delayed_scaling.input.top == state(trained).top[0] > 0
    fewer = {name: tensor for name, tensor in saved.items() if name.startswith("2/")}
    third = make()
    state(third).load(fewer | {"gone/top": torch.zeros(3)})
    assert third[0].delayed_scaling.input.top == 0
    assert third[2].delayed_scaling.input.top == state(trained).top[3]


def test_the_maxima_of_a_step_can_be_given_up(trained: nn.Sequential) -> None:
    before = state(trained).top.clone()
    step(trained, 1000 * batch())
    state(trained).discard()
    assert not torch.stack(state(trained).amax).any()
    assert torch.equal(state(trained).top, before)


def test_a_cast_is_one_call_for_both_layouts(monkeypatch: pytest.MonkeyPatch, trained: nn.Sequential) -> None:
    calls: list[tuple[int, ...]] = []
    originals = functional.quantise_delayed, functional.quantise_made_delayed

    def watched(x: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(tuple(x.shape))
        return originals[0](x, *args, **options)

    def watched_made(inputs: Sequence[Tensor], *args: Any, **options: Any) -> Any:
        calls.append(tuple(inputs[0].shape))
        return originals[1](inputs, *args, **options)

    monkeypatch.setattr(functional, "quantise_delayed", watched)
    monkeypatch.setattr(functional, "quantise_made_delayed", watched_made)
    monkeypatch.setattr(functional, "quantise", None)
    step(trained, batch())
    assert len(calls) == 6
