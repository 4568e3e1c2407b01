"""Evaluation: weights of unequal batches, metrics, batches without items, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.errors import BatchError, ConfigError, LoaderError
from deepseek_mp.trainer.evaluation import check_metrics, evaluate

CPU = torch.device("cpu")


def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def batches(sizes):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(sizes), 4, generator=generator)
    labels = torch.randint(0, 3, (sum(sizes),), generator=generator)
    return list(zip(inputs.split(sizes), labels.split(sizes), strict=True))


def joined(parts):
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def accuracy(output, target):
    return (output.argmax(dim=1) == target).float().mean()


def run(loader, loss_fn=None, **metrics):
    with torch.no_grad():
        return evaluate(MODEL, loader, loss_fn, metrics, CPU)


MODEL = model()


def test_unequal_batches_count_by_their_size():
    parts = batches([7, 1, 3])
    inputs, labels = joined(parts)
    found = run(parts, accuracy=accuracy)
    assert list(found) == ["loss", "accuracy"]
    assert found["loss"] == pytest.approx(F.cross_entropy(MODEL(inputs), labels).item())
    assert found["accuracy"] == pytest.approx(accuracy(MODEL(inputs), labels).item())
    naive = sum(F.cross_entropy(MODEL(x), y).item() for x, y in parts) / 3
    assert abs(naive - found["loss"]) > 1e-3


def test_a_masked_loss_counts_by_its_labels():
    inputs, labels = batches([4])[0]
    masked = labels.clone()
    masked[1:] = -100
    parts = [(inputs, labels), (inputs, masked)]
    found = run(parts)
    expected = F.cross_entropy(MODEL(torch.cat([inputs, inputs])), torch.cat([labels, masked]))
    assert found["loss"] == pytest.approx(expected.item())


def test_a_loss_with_a_count_of_its_own_is_weighted_by_it():
    def loss_fn(output, target):
        return output.mean(), 1 if len(target) > 1 else 9

    parts = batches([3, 1])
    values = [MODEL(x).mean().item() for x, _ in parts]
    assert run(parts, loss_fn)["loss"] == pytest.approx((values[0] + 9 * values[1]) / 10)


def test_sums_over_many_batches_do_not_lose_small_parts():
    def loss_fn(output, target):
        return output.sum() * 0 + 1e-4 + (1e4 if len(target) == 2 else 0), len(target)

    parts = [*batches([2]), *batches([1] * 400)]
    assert run(parts, loss_fn)["loss"] == pytest.approx((2 * (1e4 + 1e-4) + 400 * 1e-4) / 402, rel=1e-6)


@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy])
def test_batches_without_items_count_for_nothing(loss_fn):
    inputs, labels = batches([5])[0]
    empty, ignored = (inputs[:0], labels[:0]), (inputs, torch.full((5,), -100))
    found = run([empty, (inputs, labels), ignored], loss_fn)
    assert found["loss"] == pytest.approx(F.cross_entropy(MODEL(inputs), labels).item())


def test_a_count_on_the_device_weighs_as_one_on_the_host():
    def loss_fn(output, target):
        count = (target != -100).sum()
        return F.cross_entropy(output, target), count  # 0/0 where there is none

    inputs, labels = batches([5])[0]
    found = run([(inputs, torch.full((5,), -100)), (inputs, labels)], loss_fn)
    assert found["loss"] == pytest.approx(F.cross_entropy(MODEL(inputs), labels).item())


def test_a_loss_that_is_not_finite_shows():
    inputs, labels = batches([5])[0]
    spoiled = inputs.clone()
    spoiled[0, 0] = math.nan
    assert math.isnan(run([(inputs, labels), (spoiled, labels)])["loss"])


@pytest.mark.parametrize(
    "loader",
    [[], (_ for _ in ()), [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))],
     [(torch.zeros(2, 4), torch.full((2,), -100))]],
    ids=["empty", "generator", "empty batches", "all masked"],
)  # fmt: skip
def test_nothing_to_evaluate_is_an_error(loader):
    with pytest.raises(LoaderError, match=r"gave nothing to evaluate.*Allowed: a loader with data.*drop_last"):
        run(loader)


class Answer:
    """An output with a loss, as Hugging Face models return."""

    def __init__(self, logits, labels):
        self.logits, self.loss = logits, F.cross_entropy(logits, labels)


class Answering(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, features, labels):
        return Answer(self.inner(features), labels)


def test_mapping_batches_and_their_labels_reach_model_and_metrics():
    parts = batches([4, 2])
    inputs, labels = joined(parts)
    answering = Answering()
    with torch.no_grad():
        found = evaluate(
            answering,
            [{"features": x, "labels": y} for x, y in parts],
            None,
            {"accuracy": lambda output, target: accuracy(output.logits, target)},
            CPU,
        )
    assert found["loss"] == pytest.approx(F.cross_entropy(answering.inner(inputs), labels).item())
    assert found["accuracy"] == pytest.approx(accuracy(answering.inner(inputs), labels).item())


@pytest.mark.parametrize("value", [0.25, 1, torch.tensor(0.5), torch.tensor([2.0]), torch.tensor(3)])
def test_a_metric_may_be_any_number(value):
    assert run(batches([2, 3]), number=lambda output, target: value)["number"] == float(value)


@pytest.mark.parametrize(
    ("value", "passed"),
    [(torch.zeros(3), r"a tensor of shape \[3\]"), (None, "a NoneType"), ("good", "a str"), ([1.0], "a list")],
)
def test_a_metric_that_is_no_number_is_an_error_with_its_name(value, passed):
    with pytest.raises(ConfigError, match=rf"metric 'mine' returned {passed}\. Allowed: a number.*Reduce it"):
        run(batches([2]), mine=lambda output, target: value)


def test_a_batch_of_the_wrong_form_is_an_error():
    with pytest.raises(BatchError, match=r"a batch that is tuple of 3.*Allowed: a tensor; a pair"):
        run([(1, 2, 3)])


@pytest.mark.parametrize("metrics", [None, {}, {"a": accuracy}])
def test_metrics_are_functions_by_name(metrics):
    check_metrics(metrics)


@pytest.mark.parametrize("metrics", [[accuracy], accuracy, {"a": 1.0}, "accuracy"])
def test_other_metrics_are_refused(metrics):
    with pytest.raises(ConfigError, match=r"metrics=.*Allowed: None, or a mapping from names to functions"):
        check_metrics(metrics)


def test_no_metric_has_the_name_of_the_loss():
    with pytest.raises(ConfigError, match="a metric of the name 'loss'"):
        check_metrics({"loss": accuracy})
