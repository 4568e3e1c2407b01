"""Distances to the reference: formulas, what they are of, and what cannot be compared."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import kl, relative
from deepseek_mp.inference.fidelity import check_metric, error_of, find_metric, is_finite, measured


def test_kl_is_the_formula_over_the_last_dimension():
    reference, logits = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    p, q = reference.softmax(-1).double(), logits.softmax(-1).double()
    assert kl(logits, reference) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert kl(reference, reference) == 0
    assert kl(reference + 3, reference) == pytest.approx(0, abs=1e-6), "a shift changes no probability"


def test_kl_is_never_negative_by_rounding_and_keeps_nan():
    torch.manual_seed(0)
    found = [kl(one.double() + 1e-9 * torch.randn(10), one) for one in torch.randn(200, 10)]
    assert min(found) >= 0
    assert math.isnan(kl(torch.full((2,), math.nan), torch.ones(2)))


@pytest.mark.parametrize("wrap", [lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)])
def test_kl_finds_logits(wrap):
    reference, logits = torch.randn(3, 5), torch.randn(3, 5)
    assert kl(wrap(logits), wrap(reference)) == kl(logits, reference)


@pytest.mark.parametrize("outputs", [(torch.ones(2, 2),), torch.ones(2, 1), torch.ones(2, 2).long(), torch.tensor(1.0)])
def test_kl_of_what_has_no_classes_is_refused(outputs):
    with pytest.raises(ConfigError, match="metric='kl' for outputs of type"):
        kl(outputs, outputs)


def test_relative_is_the_largest_over_the_tensors():
    reference = {"a": torch.tensor([3.0, 4.0]), "b": (torch.ones(4), torch.tensor([1, 2]))}
    outputs = {"a": torch.tensor([3.0, 4.5]), "b": (torch.ones(4) * 1.2, torch.tensor([1, 2]))}
    assert relative(outputs, reference) == pytest.approx(0.2)
    outputs["b"] = (torch.full((4,), torch.nan), torch.tensor([1, 2]))
    assert relative(outputs, reference) != relative(outputs, reference), "NaN stays NaN"


def test_finite_is_asked_of_floating_tensors():
    assert is_finite([torch.ones(2), torch.tensor([1])])
    assert not is_finite({"x": torch.tensor([1.0, torch.inf])})
    assert is_finite(torch.tensor([1]))
    assert not is_finite(torch.tensor([1, complex(0, float("nan"))]))
    with pytest.raises(ConfigError, match=r"outputs without a tensor, of type str.*Let the model's forward return"):
        is_finite("text")


def test_relative_is_of_floating_and_complex_tensors():
    reference = torch.tensor([3 + 4j, 0])
    assert relative(reference * (1 + 0.1j), reference) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="metric='relative' for outputs without a floating tensor, of type Tensor"):
        relative(torch.tensor([1]), torch.tensor([1]))


@pytest.mark.parametrize("value", [0.5, 1, True, torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.ones(())])
def test_a_metric_gives_a_number_of_any_kind(value):
    found = measured(lambda outputs, reference: value, None, None)
    assert type(found) is float
    assert found == float(value)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "gave a NoneType"),
        ("0.5", "gave a str"),
        (torch.ones(2), r"'own' that gave a tensor of shape \[2\]\. Allowed: one number for all outputs.*\.mean\(\)"),
        (torch.tensor(1j), "gave a Tensor"),
        ([0.5], "gave a list"),
        (1j, "gave a complex"),
        (np.ones(2), "gave a ndarray"),
    ],
)
def test_a_metric_that_gives_something_else_is_refused(value, match):
    def own(outputs, reference):
        return value

    with pytest.raises(ConfigError, match=match):
        measured(own, None, None)


def test_what_the_device_raises_is_no_fault_of_the_metric():
    class Lost(torch.Tensor):
        def __float__(self):
            raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        measured(lambda outputs, reference: torch.zeros(()).as_subclass(Lost), None, None)


@pytest.mark.parametrize(("value", "budget"), [(0.0, 0.0), (0, 0.1), (6e-8, 0.0), (-6e-8, 1e-3), (9e-4, 0.1)])
def test_a_metric_may_be_off_zero_by_rounding(value, budget):
    check_metric(lambda outputs, reference: value, None, budget)


@pytest.mark.parametrize(
    ("value", "budget", "match"),
    [
        (1.0, 1e-3, r"a metric that is 1 between outputs and themselves\. Allowed: 0 for equal.*Subtract"),
        (0.24, 0.3, "a metric that is 0.24 between"),
        (-40.0, 0.1, "a metric that is -40 between"),
        (2e-6, 0.0, "a metric that is 2e-06 between"),
        (float("nan"), 1.0, "a metric that is nan between.*one sample or more"),
        (float("inf"), float("inf"), "a metric that is inf between.*one sample or more"),
    ],
)
def test_a_metric_that_is_not_zero_for_equal_outputs_is_refused(value, budget, match):
    with pytest.raises(ConfigError, match=match):
        check_metric(lambda outputs, reference: value, None, budget)


def test_metrics_by_name_or_as_they_are():
    assert find_metric("relative") is relative
    own = lambda outputs, reference: 0.0  # noqa: E731
    assert find_metric(own) is own
    with pytest.raises(ConfigError, match=r"metric='accuracy'.*Allowed: 'kl', 'relative'"):
        find_metric("accuracy")


@pytest.mark.parametrize("metric", [None, ["kl"], {}, torch.nn.KLDivLoss])
def test_what_is_neither_a_name_nor_a_function_is_refused(metric):
    with pytest.raises(ConfigError, match=r"metric=.*or a function of outputs and the reference's"):
        find_metric(metric)


@pytest.mark.parametrize("place", [0, 1])
def test_a_metric_that_writes_to_what_it_is_given_is_refused(place):
    def own(*given):
        given[place]["logits"].sub_(1)
        return 0.0

    outputs, reference = ({"logits": torch.ones(1, 2)} for _ in range(2))
    with pytest.raises(ConfigError, match="the metric 'own' that writes to the outputs or the reference"):
        measured(own, outputs, reference)


def test_tensors_of_inference_mode_are_measured_too():
    with torch.inference_mode():
        assert measured(relative, torch.ones(1, 2), torch.ones(1, 2)) == 0


def test_outputs_that_are_not_finite_are_infinitely_far_whatever_the_metric_sees():
    reference = {"logits": torch.tensor([[1.0, 2.0]]), "hidden": torch.tensor([1.0])}
    assert error_of(kl, reference, reference) == 0
    assert error_of(kl, {**reference, "hidden": torch.tensor([torch.nan])}, reference) == math.inf
    assert error_of(lambda outputs, reference: math.nan, reference, reference) == math.inf


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2)]), "nested"),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "nested"),
    ],
)
def test_outputs_that_are_not_dense_are_refused(tensor, kind):
    with pytest.raises(ConfigError, match=rf"outputs with a tensor that is {kind}\. Allowed: dense tensors"):
        is_finite([torch.ones(1), tensor])
