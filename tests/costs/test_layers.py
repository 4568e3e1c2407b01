"""The table of layer timings: order, budget, cache, coverage, and formats that fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from deepseek_mp.costs import layers as module
from deepseek_mp.costs.cache import CostCache
from deepseek_mp.costs.decide import Candidate
from deepseek_mp.costs.layers import LayerTimes, measure_layers
from deepseek_mp.costs.timing import Timing
from deepseek_mp.costs.units import UnitCall, record_units

CPU = torch.device("cpu")
FP32, BF16 = Candidate(format="fp32"), Candidate(format="bf16")
BOTH = [FP32, BF16]
LAYOUTS = [*BOTH, Candidate(format="bf16", memory_format="channels_last")]


@dataclass
class FakeMeasure:
    """Stands in for `measure_unit`: takes one second, and a millisecond per 1000 multiply-adds."""

    failures: dict[str, Exception | None] = field(default_factory=dict)
    now: float = 0.0
    made: list[tuple[str, str, str]] = field(default_factory=list)

    def __call__(
        self, call: UnitCall, format: str, layout: str, device: torch.device, budget_s: float, *, kernels: str | None
    ) -> Timing | None:
        self.now += 1.0
        self.made.append((call.names[0], format, layout))
        if format in self.failures:
            error = self.failures[format]
            if error is None:
                return None
            raise error
        ms = call.macs / 1000 / (2 if format == "bf16" else 1)
        return Timing(median_ms=ms, low_ms=ms, high_ms=ms, runs=3)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeMeasure:
    made = FakeMeasure()
    monkeypatch.setattr(module, "measure_unit", made)
    return made


@pytest.fixture
def calls() -> tuple[UnitCall, ...]:
    """Three kinds of calls; by multiply-adds 'big' is half of all, 'twice' (two calls) a third."""
    model = nn.ModuleDict({"small": nn.Linear(10, 10), "twice": nn.Linear(10, 10), "big": nn.Linear(10, 30)})

    def run() -> None:
        model["big"](torch.ones(10, 10))
        model["twice"](torch.ones(5, 2, 10))
        model["twice"](torch.ones(5, 2, 10))
        model["small"](torch.ones(10, 10))

    return record_units(model, run)


def measure(
    calls: tuple[UnitCall, ...],
    fake: FakeMeasure,
    *,
    budget_s: float = 100.0,
    candidates: list[Candidate] = BOTH,
    cache: CostCache | None = None,
    exclude: Callable[[str], bool] = lambda name: False,
) -> LayerTimes:
    return measure_layers(
        calls,
        candidates,
        device=CPU,
        budget_s=budget_s,
        cache=cache or CostCache(disk=False),
        environment={"device": "test"},
        exclude=exclude,
        clock=lambda: fake.now,
    )


def test_all_layers_are_timed_the_largest_first_and_summed(calls: tuple[UnitCall, ...], fake: FakeMeasure) -> None:
    times = measure(calls, fake)
    assert [name for name, format, _ in fake.made if format == "fp32"] == ["big", "twice", "small"]
    assert times.coverage == 1.0
    assert times.total_ms(FP32) == pytest.approx(2 * (3.0 + 2 * 1.0 + 1.0))
    assert times.total_ms(BF16) == pytest.approx(3.0 + 2 * 1.0 + 1.0)
    assert times.of_layers()["twice"] == {"fp32": pytest.approx(4.0), "bf16": pytest.approx(2.0)}


def test_when_time_is_up_the_sums_still_compare_the_same_layers(calls: tuple[UnitCall, ...], fake: FakeMeasure) -> None:
    times = measure(calls, fake, budget_s=1.5)
    assert fake.made == [("big", "fp32", "contiguous"), ("big", "bf16", "contiguous")]
    assert times.coverage == pytest.approx(0.5)
    assert times.total_ms(FP32) == pytest.approx(2 * (times.total_ms(BF16) or 0))


def test_cached_timings_cost_no_time_and_are_used_when_time_is_up(
    calls: tuple[UnitCall, ...], fake: FakeMeasure
) -> None:
    cache = CostCache(disk=False)
    first = measure(calls, fake, cache=cache)
    fake.made.clear()
    again = measure(calls, fake, cache=cache, budget_s=0.0)
    assert fake.made == []
    assert again == first


def test_a_cached_value_that_is_no_timing_is_measured_again(calls: tuple[UnitCall, ...], fake: FakeMeasure) -> None:
    cache = CostCache(disk=False)
    first = measure(calls, fake, cache=cache)
    key = {"device": "test", "unit": calls[0].signature, "format": "fp32", "memory_format": "contiguous"}
    cache.put({**key, "search": False, "kernels": None}, {"median_ms": "?"})
    fake.made.clear()
    with pytest.warns(UserWarning, match="measured again"):
        assert measure(calls, fake, cache=cache) == first
    assert fake.made == [("big", "fp32", "contiguous")]


def test_the_memory_format_is_timed_only_where_it_matters(fake: FakeMeasure) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(18, 4))
    calls = record_units(model, lambda: model(torch.ones(2, 2, 5, 5)))
    times = measure(calls, fake, candidates=LAYOUTS)
    assert ("0", "bf16", "channels_last") in fake.made
    assert [made for made in fake.made if made[:2] == ("2", "bf16")] == [("2", "bf16", "contiguous")]
    assert times.total_ms(LAYOUTS[2]) is not None


def test_pinned_layers_are_not_timed_and_not_covered(calls: tuple[UnitCall, ...], fake: FakeMeasure) -> None:
    times = measure(calls, fake, exclude=lambda name: name == "big")
    assert "big" not in times.of_layers()
    assert times.coverage == pytest.approx(0.5)


def test_a_candidate_that_fails_is_out_and_the_others_are_summed(
    calls: tuple[UnitCall, ...], fake: FakeMeasure
) -> None:
    fake.failures["bf16"] = RuntimeError("no such kernel")
    times = measure(calls, fake)
    assert times.errors == {BF16: "RuntimeError: no such kernel"}
    assert times.total_ms(BF16) is None
    assert times.total_ms(FP32) == pytest.approx(12.0)
    assert sum(format == "bf16" for _, format, _ in fake.made) == 1


def test_a_unit_that_does_not_run_alone_is_left_out(calls: tuple[UnitCall, ...], fake: FakeMeasure) -> None:
    fake.failures["fp32"] = RuntimeError("only inside the model")
    times = measure(calls, fake)
    assert times.untimed["big"] == "RuntimeError: only inside the model"
    assert (times.rows, times.coverage, times.errors) == ((), 0.0, {})
    assert {format for _, format, _ in fake.made} == {"fp32"}


def test_a_layer_that_does_not_fit_in_one_format_is_left_out_of_all(
    calls: tuple[UnitCall, ...], fake: FakeMeasure
) -> None:
    fake.failures["bf16"] = None
    times = measure(calls, fake)
    assert (times.rows, times.coverage, times.total_ms(FP32)) == ((), 0.0, None)


def test_a_model_without_matrix_products_has_no_coverage(fake: FakeMeasure) -> None:
    assert measure((), fake) == LayerTimes()
