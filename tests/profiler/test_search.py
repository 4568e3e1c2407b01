"""The search for the lowest precision, on black boxes with known answers."""

import json
import math

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.profiler import lowest_precision

ERRORS = {"bf16": 1e-2, "fp16": 1e-3}


def simulation(weights):
    """A metric of one plus the errors of its parts, each with a weight."""

    def run(formats):
        return 1.0 + sum(weights[part] * ERRORS[format] for part, format in formats.items())

    return run


def found(weights, tolerance, formats=("fp32", "fp16", "bf16")):
    return lowest_precision(simulation(weights), list(weights), tolerance=tolerance, formats=formats)


def test_each_part_gets_the_lowest_format_it_can_do_with():
    report = found({"harmless": 1e-6, "middling": 0.5, "delicate": 100.0}, 2e-3)
    assert report.formats == {"harmless": "bf16", "middling": "fp16", "delicate": "fp32"}
    assert report.error <= 2e-3
    assert report.alone["delicate"] == pytest.approx({"bf16": 1.0, "fp16": 0.1})


def test_parts_that_hold_alone_are_raised_until_they_hold_together():
    report = found({"a": 0.9, "b": 0.8, "c": 0.1}, 1e-2)
    assert report.error <= 1e-2
    assert report.formats == {"a": "fp16", "b": "bf16", "c": "bf16"}
    assert report.alone["a"]["fp16"] == pytest.approx(9e-4)


def test_a_metric_that_is_not_finite_holds_nothing():
    def run(formats):
        return math.nan if formats.get("a") == "fp16" else 1.0

    report = lowest_precision(run, ["a"], tolerance=1e-3, formats=("fp32", "bf16", "fp16"))
    assert report.formats == {"a": "bf16"}
    assert report.alone["a"]["fp16"] == math.inf
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["alone"]["a"]["fp16"] == "inf"
    assert "a" in str(report)


def test_a_reference_of_zero_is_compared_absolutely():
    report = lowest_precision(lambda formats: 1e-4 * len(formats), ["a"], tolerance=1e-3, formats=("fp32", "bf16"))
    assert report.formats == {"a": "bf16"}
    assert report.error == pytest.approx(1e-4)


def test_a_metric_of_chance_is_named():
    values = iter(range(1, 1000))
    with pytest.raises(ConfigError, match=r"differs by .* with all parts in fp32"):
        lowest_precision(lambda formats: float(next(values)), ["a"], tolerance=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": []}, "parts"),
        ({"parts": ["a", "a"]}, "parts"),
        ({"formats": ["fp32"]}, "formats"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"tolerance": True}, "tolerance=True"),
        ({"tolerance": math.nan}, "tolerance=nan"),
    ],
)
def test_bad_questions_are_refused(change, message):
    asked = {"parts": ["a"], "formats": ("fp32", "bf16"), "tolerance": 1e-3, **change}
    with pytest.raises(ConfigError, match=message):
        lowest_precision(lambda formats: 1.0, **asked)


@pytest.mark.parametrize("metric", [None, "high", torch.ones(2)])
def test_a_metric_that_is_no_number_is_refused(metric):
    with pytest.raises(ConfigError, match=f"a metric that is a {type(metric).__name__}"):
        lowest_precision(lambda formats: metric, ["a"], tolerance=1e-3)


def test_progress_is_told():
    told = []
    lowest_precision(lambda f: 1.0, ["a", "b"], tolerance=1, progress=lambda text, share: told.append((text, share)))
    assert told == [("a alone", 0.0), ("b alone", 0.5), ("all parts together", 1.0)]
