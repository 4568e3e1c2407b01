"""The plan of `auto`: real measurements on small models, and made-up ones where a decision is tested."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.backends import Capabilities, autocast
from deepseek_mp.costs import CostCache, Timing, layers, whole_step
from deepseek_mp.costs.decide import decide
from deepseek_mp.errors import PlanError
from deepseek_mp.nn import apply, current_plan, register_unit
from deepseek_mp.precision import PrecisionPlan, Reason
from deepseek_mp.trainer import auto
from deepseek_mp.trainer.auto import choose_plan

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Device:
    """Capabilities of a CPU that trains in these formats."""

    formats: tuple[str, ...] = ("bf16", "fp32")
    backend: str = "cpu"
    device_name: str = "test"
    id: str = "unknown"
    vendor: str = "nobody"
    matmul_formats: frozenset[str] = frozenset({"bf16", "fp32"})

    def admissible(self) -> tuple[str, ...]:
        return self.formats

    def require(self, format: str, *, emulate: bool) -> bool:
        return True


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    """The loss of one sample batch of the model."""
    images = any(isinstance(module, nn.Conv2d) for module in model.modules())
    inputs, target = torch.randn(4, 1, 8, 8) if images else torch.randn(4, 16), torch.tensor([0, 1, 2, 0])
    return lambda: F.cross_entropy(model(inputs), target)


def choose(
    model: nn.Module,
    run: Callable[[], Tensor] | None = None,
    *,
    device: Device | None = None,
    pins: Mapping[str, str] | None = None,
    cache: CostCache | None = None,
    compiled: bool = False,
    kernels: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> PrecisionPlan:
    capabilities: Any = device or Device()
    assert isinstance(Capabilities, type)
    return choose_plan(
        model,
        run or loss_of(model),
        device=CPU,
        capabilities=capabilities,
        pins=pins or {},
        compiled=compiled,
        cache=cache or CostCache(disk=False),
        kernels=kernels,
        progress=progress,
    )


@dataclass
class Times:
    """Made-up milliseconds: of a step by candidate, and of every unit by format."""

    step: dict[str, float] = field(default_factory=dict)
    unit: dict[str, float | Callable[[Any], float]] = field(default_factory=dict)
    stepped: list[str] = field(default_factory=list)
    model: nn.Module | None = None


def timing(ms: float) -> Timing:
    return Timing(median_ms=ms, low_ms=ms, high_ms=ms, runs=2)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Steps and units run once and take the time that the test says."""
    made = Times()

    def step(fn: Callable[[], object], device: torch.device, **_: Any) -> Timing:
        assert made.model is not None
        plan = current_plan(made.model)
        assert plan is not None
        key = plan.base.name if plan.memory_format == "contiguous" else f"{plan.base.name}_{plan.memory_format}"
        made.stepped.append(key)
        fn()
        return timing(made.step[key])

    def unit(call: Any, format: str, layout: str, *_: Any, **__: Any) -> Timing:
        ms = made.unit[format]
        return timing(ms(call) if callable(ms) else ms)

    monkeypatch.setattr(whole_step, "time_call", step)
    monkeypatch.setattr(layers, "measure_unit", unit)
    return made


def whole(plan: PrecisionPlan) -> Any:
    (decision,) = [decision for decision in plan.decisions if decision.layer == ""]
    return decision


def state(model: nn.Module) -> list[Any]:
    """All that a trial might leave behind: values, objects, strides, classes, flags, hooks."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, id(t), t.stride(), t.detach().clone().tolist(), t.requires_grad) for name, t in tensors],
        [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        [(type(m), m.training, sorted(vars(m)), list(m._forward_hooks)) for m in model.modules()],
        list(model._forward_pre_hooks),
    ]


def flags() -> list[Any]:
    """Settings of the process."""
    cpu = torch.backends.mkldnn
    return [
        torch.get_float32_matmul_precision(),
        cpu.matmul.fp32_precision,
        cpu.conv.fp32_precision,
        torch.backends.cudnn.benchmark,
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    ]


def generators() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(1))


# -- real measurements ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conv_net, mlp])
def test_a_real_choice_restores_everything_and_has_evidence(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "LAYERS_S", {"cpu": 600.0})  # all layers and FP32, however busy the machine is
    monkeypatch.setitem(decide.__globals__, "CHEAP_S", 600.0)
    monkeypatch.setattr(auto, "TOTAL_S", 600.0)
    model = make()
    run = loss_of(model)
    run().backward()
    before, before_flags = state(model), flags()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = generators()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])

    said: list[tuple[str, float]] = []
    plan = choose(model, run, progress=lambda text, fraction: said.append((text, fraction)))

    assert state(model) == before
    assert flags() == before_flags
    assert generators() == expected
    decision = whole(plan)
    evidence = decision.evidence
    assert decision.new == plan.base.name
    assert decision.reason in (Reason.MEASURED_FASTEST, Reason.MEASURED_SLOWER)
    assert evidence["chosen"].startswith(plan.base.name)
    assert evidence["coverage"] == 1.0
    assert evidence["fp32_ms"] > 0
    assert evidence["fp32_layers_ms"] > 0
    assert plan.base.name == "fp32" or evidence[f"{evidence['chosen']}_ms"] < evidence["fp32_ms"]
    timed = {decision.layer: decision for decision in plan.decisions if decision.layer}
    assert set(timed) == {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert all(decision.evidence["fp32_ms"] > 0 and decision.new == plan.base.name for decision in timed.values())
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    fractions = [fraction for _, fraction in said]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_convolutions_are_tried_in_channels_last_and_linear_models_are_not() -> None:
    assert "fp32_channels_last_layers_ms" in whole(choose(conv_net())).evidence
    assert "fp32_channels_last_layers_ms" not in whole(choose(mlp())).evidence


# -- the choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "unit", "base", "layout", "reason"),
    [
        ({"fp32": 10, "bf16": 5, "bf16_channels_last": 3}, {"fp32": 2, "bf16": 1}, "bf16", "channels_last", "fastest"),
        ({"fp32": 10, "bf16": 5, "bf16_channels_last": 6}, {"fp32": 2, "bf16": 1}, "bf16", "contiguous", "fastest"),
        ({"fp32": 4, "bf16": 5, "bf16_channels_last": 6}, {"fp32": 2, "bf16": 1}, "fp32", "contiguous", "slower"),
        ({"fp32": 4, "fp32_channels_last": 3}, {"fp32": 1, "bf16": 2}, "fp32", "channels_last", "slower"),
    ],
)
def test_the_fastest_step_is_kept(
    times: Times, step: dict[str, float], unit: dict[str, float], base: str, layout: str, reason: str
) -> None:
    times.model, times.step, times.unit = conv_net(), step, unit
    plan = choose(times.model)
    assert (plan.base.name, plan.memory_format, whole(plan).reason) == (base, layout, f"measured_{reason}")
    assert {key: whole(plan).evidence[f"{key}_ms"] for key in times.stepped} == step


def test_fp32_that_loses_clearly_is_not_tried_if_that_would_take_long(
    times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    times.model, times.step, times.unit = mlp(), {"bf16": 5}, {"fp32": 3, "bf16": 1}
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(whole_step, "time", type("Time", (), {"perf_counter": staticmethod(clock)}))
    plan = choose(times.model)
    assert times.stepped == ["bf16"]
    assert whole(plan).evidence["fp32_layers_ms"] == 6.0
    assert "fp32_ms" not in whole(plan).evidence
    assert plan.base.name == "bf16"


def test_no_trial_is_started_when_time_is_up(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    times.model, times.unit = mlp(), {"fp32": 3, "bf16": 1}
    monkeypatch.setattr(auto, "TOTAL_S", -1.0)
    plan = choose(times.model)
    assert times.stepped == []
    assert plan.base.name == "bf16", "the layers are the evidence"
    assert "no further trial" in whole(plan).evidence["stopped"]


def test_a_device_with_fp32_only_makes_no_trial() -> None:
    def run() -> Tensor:
        raise AssertionError("nothing is to be run")

    plan = choose(mlp(), run, device=Device(formats=("fp32",)), pins={"0": "fp32"})
    assert (plan.base.name, whole(plan).reason) == ("fp32", Reason.DEVICE_LACKS)
    assert [rule.pattern for rule in plan.rules] == ["0"]


def test_formats_of_later_releases_are_not_tried(times: Times) -> None:
    times.model, times.step, times.unit = mlp(), {"fp32": 2, "bf16": 1}, {"fp32": 1, "bf16": 1}
    choose(times.model, device=Device(formats=("fp8_e4m3", "bf16", "fp32")))
    assert sorted(times.stepped) == ["bf16", "fp32"]


FP8 = {"fp8_e4m3", "fp8_e5m2", "bf16", "fp32"}


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 8))


def choose_with_fp8(model: nn.Module, **options: Any) -> PrecisionPlan:
    """As on a Hopper GPU, with the arithmetic of the reference."""
    inputs = torch.randn(32, 128)
    hopper = Device(id="sm_90", vendor="nvidia", matmul_formats=frozenset(FP8))
    return choose(model, lambda: model(inputs).square().mean(), device=hopper, kernels="reference", **options)


def test_fp8_is_a_candidate_for_the_layers_it_pays_in(times: Times) -> None:
    model = times.model = wide()
    times.step = {"fp32": 9, "bf16": 5, "block": 4}
    times.unit = {"fp32": 3, "bf16": 2, "block": lambda call: 1.0 if call.names[0] == "0" else 1.95}
    plan = choose_with_fp8(model)
    assert plan.base.name == "block"
    assert plan.recipe_for("0").name == "block"
    assert plan.recipe_for("2").name == "bf16", "its gain is below the margin"
    by_layer = {decision.layer: decision for decision in plan.decisions}
    assert (by_layer["0"].new, by_layer["0"].reason) == ("block", Reason.MEASURED_FASTEST)
    assert (by_layer["2"].new, by_layer["2"].reason) == ("bf16", Reason.MEASURED_SLOWER)
    assert by_layer["2"].evidence == {"fp32_ms": 3.0, "bf16_ms": 2.0, "block_ms": 1.95}
    assert whole(plan).evidence["block_layers_ms"] == 2 + 1 + 2
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    resolved = apply(model, plan, kernels="reference", emulate=True)
    assert {d.layer: d.new for d in resolved.decisions if d.layer} == {"0": "block", "2": "bf16", "4": "bf16"}


def test_fp8_that_pays_in_no_layer_is_not_tried(times: Times) -> None:
    model = times.model = wide()
    times.step, times.unit = {"fp32": 9, "bf16": 5}, {"fp32": 3, "bf16": 2, "block": 2}
    plan = choose_with_fp8(model)
    assert plan.base.name == "bf16"
    assert sorted(times.stepped) == ["bf16", "fp32"]


def test_fp8_whose_whole_step_does_not_gain_is_refused_with_both_times(times: Times) -> None:
    model = times.model = wide()
    times.step, times.unit = {"fp32": 9, "bf16": 5, "block": 4.95}, {"fp32": 3, "bf16": 2, "block": 1}
    plan = choose_with_fp8(model)
    assert plan.base.name == "bf16"
    assert (whole(plan).evidence["bf16_ms"], whole(plan).evidence["block_ms"]) == (5, 4.95)


def test_fp8_that_would_be_emulated_is_no_candidate(times: Times) -> None:
    model = times.model = wide()
    times.step, times.unit = {"fp32": 9, "bf16": 5}, {"fp32": 3, "bf16": 2}
    inputs = torch.randn(32, 128)
    plan = choose(model, lambda: model(inputs).square().mean(), device=Device())
    assert plan.base.name == "bf16"


def pixels() -> nn.Module:
    """1x1 convolutions, the first and the second of two shapes, and one of another kind between them."""
    return nn.Sequential(
        nn.Conv2d(128, 256, 1), nn.ReLU(), nn.Conv2d(256, 128, 1), nn.Conv2d(128, 128, 3, padding=1), nn.Flatten(),
        nn.Linear(128 * 4, 8),
    )  # fmt: skip


def choose_of_pixels(model: nn.Module, **options: Any) -> PrecisionPlan:
    inputs = torch.randn(2, 128, 2, 2)
    hopper = Device(id="sm_90", vendor="nvidia", matmul_formats=frozenset(FP8))
    return choose(model, lambda: model(inputs).square().mean(), device=hopper, kernels="reference", **options)


def test_1x1_convolutions_are_candidates_for_fp8_in_the_memory_format_that_suits_them(
    times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unit(call: Any, format: str, layout: str, *_: Any, **__: Any) -> Timing:
        if format == "block":
            assert call.names[0] in ("0", "2", "5")
            return timing((1.0 if layout == "channels_last" else 2.2) if call.names[0] == "0" else 1.95)
        return timing({"fp32": 3.0, "bf16": 2.5 if layout == "contiguous" else 2.0}[format])

    monkeypatch.setattr(layers, "measure_unit", unit)
    model = times.model = pixels()
    times.step = {"fp32": 9, "bf16_channels_last": 5, "block_channels_last": 4}
    plan = choose_of_pixels(model)
    assert (plan.base.name, plan.memory_format) == ("block", "channels_last")
    assert times.stepped == ["block_channels_last", "fp32", "bf16_channels_last"]
    by_layer = {decision.layer: decision for decision in plan.decisions}
    assert (by_layer["0"].new, by_layer["0"].reason) == ("block", Reason.MEASURED_FASTEST)
    assert (by_layer["2"].new, by_layer["2"].reason) == ("bf16", Reason.MEASURED_SLOWER)
    assert by_layer["0"].evidence == {
        "fp32_ms": 3.0, "bf16_ms": 2.5, "fp32_channels_last_ms": 3.0, "bf16_channels_last_ms": 2.0,
        "block_ms": 2.2, "block_channels_last_ms": 1.0,
    }  # fmt: skip
    resolved = apply(model, plan, kernels="reference", emulate=True)
    said = {decision.layer: decision for decision in resolved.decisions if decision.layer}
    assert {name: decision.new for name, decision in said.items()} == {
        "0": "block", "2": "bf16", "3": "bf16", "5": "bf16",
    }  # fmt: skip
    assert said["3"].reason is Reason.NO_KERNEL
    assert {"bf16_channels_last_ms", "block_channels_last_ms"} <= set(said["2"].evidence)


def test_of_two_memory_formats_in_fp8_only_the_faster_is_tried_against_bf16(times: Times) -> None:
    model = times.model = pixels()
    times.step = {"fp32": 9, "bf16": 5, "block": 6}
    times.unit = {"fp32": 3, "bf16": 2, "block": 1}
    plan = choose_of_pixels(model)
    assert times.stepped == ["block", "fp32", "bf16"]
    assert (plan.base.name, plan.memory_format) == ("bf16", "contiguous")
    assert "block_channels_last_layers_ms" not in whole(plan).evidence


def test_pins_hold_beside_fp8(times: Times) -> None:
    model = times.model = wide()
    times.step, times.unit = {"fp32": 9, "bf16": 5, "block": 4}, {"fp32": 3, "bf16": 2, "block": 1}
    plan = choose_with_fp8(model, pins={"0": "fp32"})
    assert (plan.base.name, plan.recipe_for("0").name, plan.recipe_for("2").name) == ("block", "fp32", "block")


def test_pins_come_first_and_pinned_layers_are_no_evidence(times: Times) -> None:
    times.model, times.step, times.unit = mlp(), {"fp32": 2, "bf16": 1}, {"fp32": 1, "bf16": 1}
    seen: list[torch.dtype] = []
    times.model[2].register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    plan = choose(times.model, pins={"2": "fp32"})
    assert plan.recipe_for("2").name == "fp32"
    assert plan.recipe_for("0").name == "bf16"
    assert set(seen) == {torch.float32}, "it is pinned in the trials too"
    assert [decision.layer for decision in plan.decisions] == ["", "0"]
    assert whole(plan).evidence["coverage"] < 1


def test_a_pin_that_fits_no_layer_is_an_error_and_changes_nothing() -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(PlanError, match="matches no layer"):
        choose(model, pins={"nowhere": "fp32"})
    assert state(model) == before


def test_a_plan_in_force_is_in_force_again_afterwards() -> None:
    model = conv_net()
    apply(model, PrecisionPlan(base=PrecisionPlan.of("bf16").base, memory_format="channels_last"))
    before, plan = state(model), current_plan(model)
    choose(model)
    after = current_plan(model)
    assert plan is not None
    assert after is not None
    assert after.digest == plan.digest
    assert state(model) == before


@pytest.mark.parametrize(("own_ms", "winner"), [(3, ("fp32", "channels_last")), (6, ("bf16", "contiguous"))])
def test_a_model_in_channels_last_is_compared_with_itself(times: Times, own_ms: float, winner: tuple[str, str]) -> None:
    model = times.model = conv_net().to(memory_format=torch.channels_last)
    times.step, times.unit = (
        {"fp32_channels_last": own_ms, "bf16": 4, "bf16_channels_last": 5},
        {"fp32": 2, "bf16": 1.99},
    )
    before = state(model)
    plan = choose(model)
    assert (plan.base.name, plan.memory_format) == winner
    assert state(model) == before


def test_compiled_is_noted(times: Times) -> None:
    times.model, times.step, times.unit = mlp(), {"fp32": 2, "bf16": 1}, {"fp32": 1, "bf16": 1}
    assert "timed compiled" in whole(choose(times.model, compiled=True)).evidence["compiled"]
    assert "compiled" not in whole(choose(times.model)).evidence


def test_whole_steps_run_compiled_and_nothing_is_compiled_again_for_training() -> None:
    torch._dynamo.reset()  # other tests may have used up its limit of recompilations
    model, compiled = mlp(), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    forward = torch.compile(model, backend=backend)

    def run() -> Tensor:
        return forward(torch.ones(8, 16)).square().mean()

    evidence = whole(choose(model, run, compiled=True)).evidence
    assert evidence["coverage"] > 0  # the hooks that record the layers saw their calls
    tried = [format for format in ("fp32", "bf16") if f"{format}_ms" in evidence]
    assert len(compiled) == len(tried) >= 1  # once per whole step, and not to record
    for format in tried:
        apply(model, format)
        with autocast("cpu", format, cache=True):
            run()
    assert len(compiled) == len(tried)


# -- failures ---------------------------------------------------------------------------------------


class OnlyFp32(torch.autograd.Function):
    """A function of a user who has not heard of autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise TypeError("float32 expected")
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Calls(nn.Module):
    """A linear layer, then what the test says."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(16, 3), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.linear(x))


def test_a_format_in_which_the_model_raises_is_ruled_out_with_the_message() -> None:
    plan = choose(Calls(OnlyFp32.apply))
    decision = whole(plan)
    assert (plan.base.name, decision.reason) == ("fp32", Reason.NO_KERNEL)
    assert "TypeError: float32 expected" in decision.evidence["failed"]["bf16"]
    assert "TypeError: float32 expected" in decision.detail


def test_a_model_that_does_not_take_channels_last_is_tried_contiguous(times: Times) -> None:
    class Views(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[1](self[0](x))
            return self[2](x.view(x.shape[0], -1))

    model = times.model = Views(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 3))
    times.step, times.unit = {"fp32": 9, "bf16": 5, "bf16_channels_last": 1}, {"fp32": 2, "bf16": 1}
    plan = choose(model)
    assert (plan.base.name, plan.memory_format) == ("bf16", "contiguous")
    assert "view" in whole(plan).evidence["failed"]["bf16_channels_last"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_of_the_model_in_fp32_is_the_users_and_changes_nothing(where: str) -> None:
    def refuse(_: Tensor) -> None:
        raise ZeroDivisionError("mine")

    def then(x: Tensor) -> Tensor:
        if where == "forward":
            refuse(x)
        x.register_hook(refuse)
        return x

    model = nn.Sequential(Calls(then), nn.BatchNorm1d(3))
    before = state(model)
    with pytest.raises(ZeroDivisionError, match="mine"):
        choose(model)
    assert state(model) == before


def test_memory_that_does_not_suffice_rules_a_format_out(times: Times) -> None:
    def then(x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and times.stepped:
            raise torch.OutOfMemoryError("none left")
        return x

    times.model = Calls(then)
    times.step, times.unit = {"bf16": 1}, {"fp32": 1, "bf16": 1}
    cache = CostCache(disk=False)
    decision = whole(choose(times.model, cache=cache))
    assert (decision.new, decision.reason) == ("bf16", Reason.MEASURED_FASTEST)
    assert decision.evidence["failed"]["fp32"] == "out of memory"
    times.stepped.clear()
    choose(times.model, cache=cache)
    assert times.stepped != [], "free memory may be more next time, so the result was not kept"


def test_a_loss_that_is_finite_in_fp32_only_rules_a_format_out(times: Times) -> None:
    times.model = Calls(lambda x: x if x.dtype is torch.float32 else x * math.inf)
    times.step, times.unit = {"fp32": 2, "bf16": 1}, {"fp32": 1, "bf16": 1}
    decision = whole(choose(times.model))
    assert decision.new == "fp32"
    assert decision.evidence["failed"]["bf16"] == "loss not finite"
    assert times.stepped == ["fp32"], "the recording saw it, so no step was spent on it"


def test_a_unit_that_runs_only_inside_the_model_is_no_evidence() -> None:
    @register_unit
    class Shared(nn.Module):
        """Works with a tensor that it finds elsewhere, and only under its own identity."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))
            self.key = id(self)

        def forward(self, x: Tensor) -> Tensor:
            assert id(self) == self.key, "a copy"
            return x @ self.weight

    model = nn.Sequential(nn.Linear(16, 3), Shared())
    decision = whole(choose(model))
    assert "a copy" in decision.evidence["untimed"]["1"]
    assert "0" not in decision.evidence["untimed"]
    assert 0 < decision.evidence["coverage"] < 1


# -- the cache --------------------------------------------------------------------------------------


def test_the_second_choice_comes_from_the_cache(tmp_path: Path) -> None:
    model = conv_net()
    ran: list[str] = []
    model[0].register_forward_hook(lambda *_: ran.append("ran"))
    run = loss_of(model)
    first = choose(model, run, cache=CostCache(tmp_path))
    ran.clear()
    before = state(model)
    second = choose(model, run, cache=CostCache(tmp_path))
    assert ran == []
    assert state(model) == before
    assert second.digest == first.digest
    assert second.decisions[1:] == first.decisions[1:]
    assert dict(whole(second).evidence) == {**whole(first).evidence, "from_cache": True}


@pytest.mark.parametrize(
    "change",
    [{"pins": {"0": "fp32"}}, {"compiled": True}, {"device": Device(device_name="another")}, {"rows": 5}],
    ids=lambda change: next(iter(change)),
)
def test_what_a_result_depends_on_is_part_of_its_key(times: Times, change: dict[str, Any]) -> None:
    model = times.model = mlp()
    times.step, times.unit = {"fp32": 2, "bf16": 1}, {"fp32": 1, "bf16": 1}
    cache = CostCache(disk=False)

    def run(rows: int = 4) -> Tensor:
        return model(torch.ones(rows, 16)).sum()

    choose(model, run, cache=cache)
    times.stepped.clear()
    rows = change.pop("rows", 4)
    choose(model, lambda: run(rows), cache=cache, **change)
    assert times.stepped != []


def test_a_cached_result_that_cannot_be_read_is_measured_again(times: Times) -> None:
    class Broken(CostCache):
        def get(self, key: Mapping[str, Any]) -> Any:
            value = super().get(key)
            return {"version": 99} if value is not None and "candidates" in key else value

    times.model = mlp()
    times.step, times.unit = {"fp32": 2, "bf16": 1}, {"fp32": 1, "bf16": 1}
    cache = Broken(disk=False)
    run = loss_of(times.model)
    choose(times.model, run, cache=cache)
    times.stepped.clear()
    with pytest.warns(UserWarning, match="measured again"):
        choose(times.model, run, cache=cache)
    assert times.stepped != []


def test_a_tiny_model_needs_few_calls(times: Times) -> None:
    model = times.model = mlp()
    times.step, times.unit = {"fp32": 2, "bf16": 1}, {"fp32": 1, "bf16": 1}
    ran: list[float] = []
    model.register_forward_hook(lambda *_: ran.append(time.perf_counter()))
    choose(model)
    assert len(ran) == 4, "one recording and one (made-up) step in each format"
