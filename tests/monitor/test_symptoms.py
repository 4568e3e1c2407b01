"""Which numbers of a sample are held against which limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deepseek_mp.monitor import Limits
from deepseek_mp.monitor.sides import sides_of
from deepseek_mp.monitor.store import TENSORS, UPDATE, Layout, Store
from deepseek_mp.monitor.symptoms import IN_USE, symptoms
from deepseek_mp.monitor.updates import UPDATE_FIELDS
from deepseek_mp.ops.statistics import ERROR_FIELDS, SPREAD_FIELDS, ideal_error
from deepseek_mp.precision import FORMATS, RECIPES

CALM = {"spike": 1.0, "rms": 1.0, "edq": 1.0}


class Sample:
    """One sample of a layer, filled in by hand."""

    def __init__(self) -> None:
        self.store = Store(Layout(units=2, ways=2, modules=2), torch.device("cpu"), 0.5)
        self.update(**CALM)

    def errors(self, tensor: str, **values: float) -> Sample:
        for name, value in values.items():
            self.store.parts.last[1, TENSORS.index(tensor), IN_USE, ERROR_FIELDS.index(name)] = value
        return self

    def kurtosis(self, first: float, now: float) -> Sample:
        for plane, value in ((self.store.parts.first, first), (self.store.parts.last, now)):
            plane[1, 0, 0, SPREAD_FIELDS.index("kurtosis")] = value
        return self

    def update(self, **values: float) -> Sample:
        for name, value in values.items():
            self.store.parts.last[1, UPDATE, 0, UPDATE_FIELDS.index(name)] = value
        self.store.parts.count[1, UPDATE] = 100
        return self

    def beyond(
        self, recipe: str = "bf16", *, limits: Limits | None = None, step: int = 5000, **more: Any
    ) -> set[tuple[Any, ...]]:
        """(tensor, kind, samples in a row that are needed) of what is beyond its limit."""
        found = symptoms(self.store.parts, 1, TENSORS, sides_of(RECIPES[recipe]), limits or Limits(), step=step, **more)
        return {(tensor, kind, wanted) for tensor, kind, value, limit, wanted in found if value > limit}


def test_a_calm_sample_has_none() -> None:
    assert Sample().beyond() == Sample().beyond("row") == set()


@pytest.mark.parametrize("sign", [1, -1])
def test_magnitude_lost_in_the_forward_and_in_the_backward_has_limits_of_its_own(sign: int) -> None:
    sample = Sample()
    for tensor in ("input", "weight", "grad_output"):
        sample.errors(tensor, mass=sign * 0.019)
    assert sample.beyond() == {("input", "mass", 3), ("weight", "mass", 3)}
    assert sample.errors("grad_output", mass=sign * 0.021).beyond() == {
        ("input", "mass", 3), ("weight", "mass", 3), ("grad_output", "mass", 3),
    }  # fmt: skip


def test_errors_that_lean_to_one_side_count_in_gradients() -> None:
    sample = Sample().errors("input", lean=0.5).errors("grad_output", lean=0.021)
    assert sample.beyond() == {("grad_output", "lean", 3)}


def test_how_many_values_become_zero_is_no_harm_of_its_own() -> None:
    sample = Sample().errors("input", underflow=0.1).errors("grad_output", underflow=0.3, bias=-0.3)
    assert sample.beyond("row") == set()


def test_what_leaves_the_range_of_fp16_is_an_alarm() -> None:
    sample = Sample().errors("input", underflow=0.006).errors("grad_output", underflow=0.04)
    assert sample.beyond("fp16") == {("input", "underflow", 3)}
    assert sample.errors("grad_output", underflow=0.06).beyond("fp16") == {
        ("input", "underflow", 3), ("grad_output", "underflow", 3),
    }  # fmt: skip


def test_overflow_counts_at_once_in_the_forward() -> None:
    sample = Sample().errors("input", overflow=1e-6).errors("grad_output", overflow=1e-6)
    assert sample.beyond() == {("input", "overflow", 1), ("grad_output", "overflow", 3)}


@pytest.mark.parametrize(("recipe", "format"), [("bf16", "bf16"), ("fp16", "fp16"), ("row", "fp8_e4m3")])
def test_errors_by_row_are_held_against_what_the_format_does_at_best(recipe: str, format: str) -> None:
    ideal = ideal_error(FORMATS[format])
    assert Sample().errors("weight", by_row=4.9 * ideal).beyond(recipe) == set()
    assert Sample().errors("weight", by_row=5.1 * ideal).beyond(recipe) == {("weight", "by_row", 3)}


def test_outliers_count_where_a_scale_makes_them_do_harm() -> None:
    grown = Sample().kurtosis(2.0, 13.0)  # more than four times that of normal values
    assert grown.beyond("row") == set()  # nothing underflows
    harmful = grown.errors("input", underflow=0.002)
    assert harmful.beyond("row") == {("input", "kurtosis", 3)}
    assert harmful.beyond("bf16") == set()  # no scale to share
    assert Sample().kurtosis(10.0, 39.0).errors("input", underflow=0.002).beyond("row") == set()


def test_formats_of_four_bits_are_as_coarse_as_they_are() -> None:
    sample = Sample().kurtosis(2.0, 13.0).errors("input", underflow=0.07, mass=-0.012)
    sample.errors("grad_output", underflow=0.07, mass=-0.03)
    assert sample.beyond("nvfp4") == set()
    assert len(sample.beyond("row")) == 3
    assert sample.errors("weight", by_row=0.06, overflow=0.01).beyond("nvfp4") == {
        ("weight", "by_row", 3), ("weight", "overflow", 1),
    }  # fmt: skip


def test_spikes_and_second_moments() -> None:
    assert Sample().update(spike=5.1, rms=2.4).beyond() == {("update", "spike", 2), ("update", "rms", 3)}
    assert Sample().update(rms=2.4).beyond(step=1000) == set()  # the moment is still filling
    sample = Sample().update(spike=5.1)
    sample.store.parts.count[1, UPDATE] = 5
    assert sample.beyond() == set()  # so is the mean
    assert Sample().update(rms=math.nan).beyond() == set()  # there is no moment


def test_lost_updates_count_where_weights_are_stored_in_16_bits() -> None:
    assert Sample().update(lost=0.9, edq=0.1).beyond() == set()
    assert Sample().update(lost=0.9, edq=math.nan).beyond() == {("update", "lost", 3)}
    assert Sample().update(lost=0.04, edq=math.nan).beyond() == set()
    assert Sample().update(lost=0.9, edq=math.nan).beyond(is_kept=True) == set()


def test_what_is_switched_off_is_not_looked_at() -> None:
    off = Limits(
        mass=None, gradient_mass=None, lean=None, underflow=None, gradient_underflow=None, overflow=None,
        by_row=None, kurtosis=None, spike=None,
        rms=None, edq=None,
    )  # fmt: skip
    assert not list(symptoms(Sample().store.parts, 1, TENSORS, sides_of(RECIPES["row"]), off, step=1))


def test_only_what_was_sampled_is_looked_at() -> None:
    sample = Sample().errors("weight", mass=1.0)
    found = symptoms(sample.store.parts, 1, ["input"], sides_of(RECIPES["row"]), Limits(), step=1)
    assert {tensor for tensor, *_ in found} == {"input"}
