"""Which layers live precision decides on, above all after 'auto': its plan, its timings, and why there is nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp import AdaptivePrecision, AdaptiveSettings, MixedPrecisionTrainer, backends
from deepseek_mp.costs import Timing, layers, whole_step
from deepseek_mp.nn import current_plan
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.trainer import adaptive_choices, planning

FP8 = frozenset({"fp8_e4m3", "fp8_e5m2", "bf16", "fp32"})
SOON = AdaptiveSettings(warm_up=4, probe_every=2, decide_every=4, loss_budget=1.0, noise_budget=9.0)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 8)
    )


def vectors(count: int = 12) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(16, 128, generator=generator), torch.randint(0, 8, (16,), generator=generator))
        for _ in range(count)
    ]


def hopper(mode: str = "auto", **options: Any) -> MixedPrecisionTrainer:
    """A trainer that takes the CPU for a GPU which multiplies FP8, with the arithmetic of the reference."""
    made = MixedPrecisionTrainer(
        wide(), mode, device="cpu", seed=1, emulate=True, kernels="reference", progress=False, **options
    )
    made.capabilities = replace(made.capabilities, id="sm_90", matmul_formats=FP8)
    return made


class Clock:
    """Made-up milliseconds: of a step by format, and of a unit by format; `units` holds what was timed."""

    def __init__(self) -> None:
        self.step = {"fp32": 9.0, "bf16": 5.0, "block": 4.0}
        self.unit: dict[str, Any] = {"fp32": 3.0, "bf16": 2.0, "block": lambda name: 1.0 if name == "0" else 1.95}
        self.units: list[tuple[str, str]] = []
        self.model: nn.Module | None = None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()

    def step(fn: Any, device: torch.device, **_: Any) -> Timing:
        assert made.model is not None
        plan = current_plan(made.model)
        assert plan is not None
        fn()
        return timing(made.step[plan.base.name])

    def unit(call: Any, format: str, *_: Any, **__: Any) -> Timing | None:
        made.units.append((call.names[0], format))
        ms = made.unit[format]
        ms = ms(call.names[0]) if callable(ms) else ms
        return None if ms is None else timing(ms)

    monkeypatch.setattr(whole_step, "time_call", step)
    monkeypatch.setattr(layers, "measure_unit", unit)
    monkeypatch.setattr(type(backends.capabilities("cpu")), "admissible", lambda self: ("bf16", "fp32"))
    return made


def timing(ms: float) -> Timing:
    return Timing(median_ms=ms, low_ms=ms, high_ms=ms, runs=2)


def test_after_auto_no_layer_is_timed_again_and_its_plan_is_where_it_begins(clock: Clock) -> None:
    made = hopper()
    clock.model = made.model
    made.step(vectors()[0])
    assert made.plan.base.name == "block"
    assert made.adaptive is not None
    assert made.adaptive.controller is not None, made.adaptive.disabled
    assert len(clock.units) == len(set(clock.units))
    assert made.adaptive.controller.base.name == "bf16"
    units = made.adaptive.controller.units
    assert {name: unit.recipes for name, unit in units.items()} == {
        "0": ("fp32", "block"),
        "2": ("fp32",),
        "5": ("fp32",),
    }
    assert units["0"].seconds["block"] == 0.001
    assert made.adaptive.controller.states["0"].recipe == "block"


def test_a_plan_that_changes_keeps_the_reasons_of_the_layers_that_stay(clock: Clock) -> None:
    made = hopper()
    clock.model = made.model
    made.step(vectors()[0])
    live = made.adaptive
    assert live is not None
    assert live.controller is not None
    live._pending += live.controller.see(1, 0.0, applied=False, first_bad_module="0")
    made.step(vectors()[0])
    now = {decision.layer: decision for decision in made.plan.decisions}
    assert (now["0"].new, now["0"].reason) == ("bf16", Reason.GUARDED)
    assert (now["2"].new, now["2"].reason) == ("bf16", Reason.MEASURED_SLOWER)
    assert made.plan.base.name == "bf16"
    assert (now[""].new, now[""].reason, now[""].evidence["block_ms"]) == ("bf16", Reason.MEASURED_FASTEST, 4.0)


def test_what_auto_could_not_time_is_not_tried_again(clock: Clock) -> None:
    clock.unit["block"] = lambda name: 1.0 if name == "0" else None  # memory is short
    made = hopper()
    clock.model = made.model
    made.step(vectors()[0])
    assert made.adaptive is not None
    assert made.adaptive.controller is not None, made.adaptive.disabled
    assert ("2", "block") in clock.units
    assert len(clock.units) == len(set(clock.units))


def test_where_auto_lowers_nothing_since_nothing_pays_it_is_off_with_both_times(clock: Clock) -> None:
    clock.unit["block"] = 1.95
    made = hopper()
    clock.model = made.model
    made.step(vectors()[0])
    assert made.adaptive is not None
    assert made.adaptive.disabled == (
        "no layer is 5% faster in block than in bf16: 0 comes closest, 1.950 ms in block against 2.000"
    )
    assert len(clock.units) == len(set(clock.units))


def test_where_fp32_won_nothing_is_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.step = {"fp32": 1.0, "bf16": 5.0, "block": 4.0}
    monkeypatch.setattr(adaptive_choices, "layer_costs", pytest.fail)
    made = hopper()
    clock.model = made.model
    made.step(vectors()[0])
    assert made.adaptive is not None
    assert made.adaptive.disabled == "'auto' found nothing faster than fp32"


def test_layers_that_were_not_timed_alone_are_not_lowered(clock: Clock) -> None:
    clock.unit |= {"fp32": lambda name: 1 / 0 if name == "2" else 3.0, "block": 1.95}
    made = hopper("bf16", callbacks=[AdaptivePrecision(AdaptiveSettings(recipes=("block",)))])
    made.step(vectors()[0])
    assert made.adaptive is not None
    assert made.adaptive.disabled.startswith("no layer is 5% faster in block than in bf16")


def chosen(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    """'auto' chooses this without measuring."""

    def choose(model: nn.Module, run: Any, **options: Any) -> PrecisionPlan:
        whole = Decision(layer="", old="fp32", new=base, reason=Reason.MEASURED_FASTEST)
        return replace(PrecisionPlan.of(base, options["pins"]), decisions=(whole,))

    monkeypatch.setattr(planning, "choose_plan", choose)


@pytest.mark.parametrize(
    ("base", "why"), [("bf16", "no FP8 recipe of its own"), ("fp16", "not lowered one by one beside fp16")]
)
def test_on_a_device_without_fp8_a_run_is_the_same_bit_for_bit_and_says_why_once(monkeypatch, tmp_path, base, why):
    chosen(monkeypatch, base)
    monkeypatch.setattr(adaptive_choices, "layer_costs", pytest.fail)
    runs = []
    for adapt in (None, False):
        made = MixedPrecisionTrainer(
            wide(), device="cpu", seed=1, adapt=adapt, emulate=True, progress=False, run_dir=tmp_path / f"{adapt}"
        )
        runs.append((made, made.fit(vectors(), epochs=2)))
    (live, one), (plain, two) = runs
    assert live.adaptive is not None
    assert plain.adaptive is None
    assert why in live.adaptive.disabled
    assert one.loss == two.loss
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, live.model.state_dict()[name]), name
    lines = [json.loads(line) for line in (tmp_path / "None" / "decisions.jsonl").read_text().splitlines()]
    off = [line for line in lines if line["reason"] == Reason.ADAPT_OFF]
    assert [(line["layer"], line["old"], line["new"], line["detail"]) for line in off] == [
        ("", base, base, live.adaptive.disabled)
    ]


def test_what_was_decided_before_a_first_step_that_fails_leaves_no_run_behind(monkeypatch, tmp_path):
    chosen(monkeypatch, "bf16")
    made = MixedPrecisionTrainer(wide(), device="cpu", progress=False, run_dir=tmp_path / "run")
    with pytest.raises(IndexError, match="out of bounds"):
        made.fit([(torch.randn(4, 128), torch.full((4,), 99))])
    assert made.adaptive.disabled
    assert not (tmp_path / "run").exists()


def test_layers_that_cannot_be_timed_do_not_end_the_training(clock, monkeypatch):
    def costs(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(adaptive_choices, "layer_costs", costs)
    made = hopper()
    clock.model = made.model
    assert made.fit(vectors()).steps_applied == 12
    assert made.adaptive.disabled == "layers could not be timed: RuntimeError: out of luck"


def recipes(made: MixedPrecisionTrainer) -> dict[str, str]:
    return {
        name: module.unit_precision.recipe.name
        for name, module in made.model.named_modules()
        if hasattr(module, "unit_precision")
    }


def settled(clock: Clock, adapt: Any, **options: Any) -> MixedPrecisionTrainer:
    made = hopper(adapt=adapt, **options)
    clock.model = made.model
    return made


NAMED = replace(SOON, recipes=("block",))


def test_a_resumed_run_decides_with_the_times_of_its_checkpoint(clock, tmp_path):
    clock.unit["block"] = 1.0
    whole = settled(clock, NAMED)
    whole.fit(vectors())
    settled(clock, NAMED, run_dir=tmp_path).fit(vectors(), max_steps=5)
    clock.units.clear()
    resumed = settled(clock, NAMED)
    resumed.fit(vectors(), resume=tmp_path)
    assert clock.units == []
    assert resumed.adaptive.controller.units == whole.adaptive.controller.units
    assert recipes(resumed) == recipes(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(("first", "then"), [(NAMED, False), (False, NAMED)])
def test_a_checkpoint_resumes_with_live_precision_and_without(clock, tmp_path, caplog, first, then):
    made = settled(clock, first, run_dir=tmp_path)
    made.fit(vectors(), max_steps=6)
    before = recipes(made)
    resumed = settled(clock, then)
    resumed.load(tmp_path)
    assert recipes(resumed) == before
    kept = "it keeps the checkpoint's plan" if then is False else "it goes on from the plan that the checkpoint has"
    assert kept in caplog.text
    assert resumed.fit(vectors()).steps_applied == 12
    assert (resumed.adaptive is None) == (then is False)
    if resumed.adaptive is not None:
        assert resumed.adaptive.controller is not None
    else:
        assert recipes(resumed) == before
