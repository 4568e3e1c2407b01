"""What is recorded of a model's calls to its units, and that a unit is measured as it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.backends import autocast
from deepseek_mp.costs import units as module
from deepseek_mp.costs.timing import Timing
from deepseek_mp.costs.units import UnitCall, measure_unit, record_units, takes
from deepseek_mp.nn import apply, register_unit

CPU = torch.device("cpu")
ONE = Timing(median_ms=1.0, low_ms=1.0, high_ms=1.0, runs=1)


class Blocks(nn.Module):
    """An embedding, equal linear layers called in different ways, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.b(F.relu(self.a(self.embed(ids)))))
        return self.head(self.a(x))


def calls_by_name(model: nn.Module, run: Callable[[], object]) -> dict[str, UnitCall]:
    return {name: call for call in record_units(model, run) for name in call.names}


def test_equal_calls_are_one_with_the_names_that_make_it() -> None:
    model = Blocks()
    calls = record_units(model, lambda: model(torch.zeros(3, 4, dtype=torch.long)))
    assert [call.names for call in calls] == [("a", "b", "a"), ("head",)]
    shared, head = calls
    assert shared.inputs[0].shape == (3, 4, 8)
    assert shared.macs == 3 * (3 * 4 * 8 * 8), "fprop, dgrad and wgrad"
    assert shared.total_macs == 3 * shared.macs
    assert head.macs == 3 * (3 * 4 * 8 * 5)


def test_products_that_training_skips_are_not_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    calls = calls_by_name(model, lambda: model(torch.ones(2, 8)))
    assert calls["0"].macs == 2 * 8 * 8, "frozen, and its input needs no gradient"
    assert calls["1"].macs == 2 * (2 * 8 * 8), "no gradient of its input"


@pytest.mark.parametrize(
    ("unit", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5), 2 * 25 * 6 * 2 * 9),
        (nn.Conv2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 4 * 6 * 4 * 9),
        (nn.Conv1d(4, 6, 2), (4, 5), 4 * 6 * 4 * 2),
        (nn.ConvTranspose2d(4, 6, 2), (2, 4, 5, 5), 2 * 25 * 4 * 6 * 4),
        (nn.Conv3d(2, 3, 1), (1, 2, 4, 4, 4), 64 * 2 * 3),
    ],
    ids=repr,
)
def test_multiply_adds_of_convolutions(unit: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    model = nn.Sequential(unit)
    (call,) = record_units(model, lambda: model(torch.ones(shape)))
    assert call.macs == 2 * macs, "fprop and wgrad"
    assert call.has_layout is (len(shape) > 3)


def test_a_region_shows_in_which_format_inputs_arrive() -> None:
    model = Blocks()

    def run() -> None:
        with autocast(CPU, "bf16"):
            model(torch.zeros(3, dtype=torch.long))

    narrow = {call.names: call.inputs[0].narrow for call in record_units(model, run)}
    # The first call of 'a' follows the embedding, all others a product of the region.
    assert narrow == {("a",): False, ("b", "a"): True, ("head",): True}


def test_recording_leaves_no_hook_and_saves_nothing_for_backward() -> None:
    model = Blocks()
    seen: list[Any] = []

    def run() -> None:
        loss = model(torch.zeros(3, dtype=torch.long)).sum()
        with pytest.raises(TypeError, match="unpack_hook"):
            loss.backward()
        seen.append(loss)

    record_units(model, run)
    assert seen
    assert not any(unit._forward_hooks for unit in model.modules())


def test_a_forward_that_differentiates_is_recorded_too() -> None:
    """Forces are the gradient of an energy: the tensors saved for it must not be dropped."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forces() -> Tensor:
        positions = torch.ones(4, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(positions).sum(), positions, create_graph=True)
        return gradient.square().sum()

    assert [call.names for call in record_units(model, forces)] == [("0",), ("2",)]


def test_hooks_are_removed_when_the_forward_fails() -> None:
    model = Blocks()
    with pytest.raises(IndexError, match="out of range"):
        record_units(model, lambda: model(torch.full((3,), 99)))
    assert not any(unit._forward_hooks for unit in model.modules())


def test_a_converted_unit_is_recorded_as_what_it_was() -> None:
    model = Blocks()
    ids = torch.zeros(3, dtype=torch.long)
    plain = record_units(model, lambda: model(ids))
    apply(model, "fp32")
    assert record_units(model, lambda: model(ids)) == plain


def recorded_step(monkeypatch: pytest.MonkeyPatch, call: UnitCall, format: str, layout: str = "contiguous") -> None:
    """Run the measured step once, so that the unit under test sees its real inputs."""

    def once(fn: Callable[[], object], device: torch.device, **_: Any) -> Timing:
        fn()
        return ONE

    monkeypatch.setattr(module, "time_call", once)
    assert measure_unit(call, format, layout, CPU, 0.1) is ONE  # type: ignore[arg-type]


@register_unit
class Spy(nn.Module):
    """A unit that remembers what it was given and what came back, in a list its copies share."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4))
        self.log: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix
        self.log.append((x, y))
        return y


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_a_unit_is_measured_in_the_region_on_inputs_like_the_models(
    monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Spy())

    def run() -> None:
        with autocast(CPU, "bf16"):
            model(torch.ones(3, 4))

    call = calls_by_name(model, run)["1"]
    model[1].log.clear()
    rng = torch.get_rng_state()
    recorded_step(monkeypatch, call, format)
    given, made = model[1].log[-1]
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    assert (given.shape, given.dtype, made.dtype) == ((3, 4), dtype, dtype)
    assert given.grad_fn is None
    assert given.requires_grad
    assert given.isfinite().all()
    assert given.std() > 0.3, "not zeros: they draw less power and run faster"
    assert model[1].matrix.grad is None, "the copy's weight is not the model's"
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_gradient_that_training_skips_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Spy())
    (call,) = record_units(model, lambda: model(torch.ones(3, 4)))
    recorded_step(monkeypatch, call, "fp32")
    assert not model[0].log[-1][0].requires_grad, "the first layer's input"


def test_the_copy_takes_neither_the_users_hooks_nor_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    fired: list[str] = []
    model[0].register_forward_hook(lambda *_: fired.append("forward"))
    model[0].weight.register_hook(lambda _: fired.append("gradient"))
    apply(model, "fp32")
    (call,) = record_units(model, lambda: model(torch.ones(2, 4)))
    fired.clear()
    recorded_step(monkeypatch, call, "bf16")
    assert fired == []


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolutions_are_measured_in_the_memory_format(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    (call,) = record_units(model, lambda: model(torch.ones(2, 3, 5, 5)))
    seen: list[tuple[Tensor, Tensor]] = []
    real = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w, *args: (seen.append((x, w)), real(x, w, *args))[1])
    recorded_step(monkeypatch, call, "fp32", layout)
    for tensor in seen[-1]:
        assert tensor.is_contiguous(memory_format=torch.channels_last) is (layout == "channels_last")
    assert model[0].weight.is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_1x1_convolution_is_measured_in_fp8_as_the_plan_would_run_it(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    model = nn.Sequential(nn.Conv2d(128, 128, 1), nn.Conv2d(128, 256, 1, bias=False), nn.Conv2d(256, 4, 3))
    (call,) = (call for call in record_units(model, lambda: model(torch.ones(2, 128, 3, 5))) if call.names == ("1",))
    seen: list[tuple[Any, ...]] = []
    real = module.conv1x1

    def watched(x: Tensor, **options: Any) -> Tensor:
        y = real(x, **options)
        seen.append((x, options["weight"], options["bias"], options["products"], y))
        return y

    monkeypatch.setattr(module, "conv1x1", watched)
    recorded_step(monkeypatch, call, "block", layout)
    x, weight, bias, products, y = seen[-1]
    assert (x.shape, weight.shape, bias, y.dtype) == ((2, 128, 3, 5), (256, 128, 1, 1), None, torch.bfloat16)
    assert products.recipe.name == "block"
    for tensor in (x, y):
        assert tensor.is_contiguous(memory_format=torch.channels_last) is (layout == "channels_last")
    assert y.requires_grad


@pytest.mark.parametrize(
    ("unit", "recipe", "fits"),
    [
        (nn.Linear(128, 128), "block", True),
        (nn.Conv2d(128, 256, 1), "block", True),
        (nn.Conv2d(128, 48, 1), "block", False),
        (nn.Conv2d(128, 48, 1), "row", True),
        (nn.Conv2d(128, 128, 3), "block", False),
        (nn.Conv2d(128, 128, 1, stride=2), "block", False),
        (nn.Conv1d(128, 128, 1), "block", True),
    ],
    ids=repr,
)
def test_which_units_a_scaled_recipe_is_timed_for(unit: nn.Module, recipe: str, fits: bool) -> None:
    shape = (2, 128) if isinstance(unit, nn.Linear) else (2, 128, 7) if isinstance(unit, nn.Conv1d) else (2, 128, 7, 7)
    model = nn.Sequential(unit)
    (call,) = record_units(model, lambda: model(torch.ones(shape)))
    assert takes(call, recipe) is fits


def test_a_unit_that_does_not_fit_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    (call,) = record_units(model, lambda: model(torch.ones(2, 4)))

    def full(*_: Any, **__: Any) -> Timing:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(module, "time_call", full)
    assert measure_unit(call, "fp32", "contiguous", CPU, 0.1) is None


def test_other_errors_of_a_unit_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    (call,) = record_units(model, lambda: model(torch.ones(2, 4)))

    def broken(*_: Any, **__: Any) -> Timing:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, "time_call", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure_unit(call, "bf16", "contiguous", CPU, 0.1)


def test_a_call_that_cannot_be_repeated_is_counted_but_not_plain() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "linear": nn.Linear(4, 4)})
    state = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))

    def run() -> None:
        model["rnn"](torch.ones(3, 2, 4), state)
        model["linear"](input=torch.ones(3, 2, 4))

    calls = calls_by_name(model, run)
    assert not calls["rnn"].plain
    assert calls["rnn"].macs == 2 * (3 * 2 * 2 * 16 * 4)
    assert not calls["linear"].plain


def test_a_measured_unit_has_a_real_time() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    (call,) = record_units(model, lambda: model(torch.ones(32, 64)))
    timing = measure_unit(call, "bf16", "contiguous", CPU, 0.01)
    assert timing is not None
    assert timing.low_ms > 0
