"""Losses that are known to be the cross entropy of the output, and those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.errors import ConfigError
from deepseek_mp.nn.known_loss import CrossEntropy, computes_cross_entropy, known_cross_entropy
from deepseek_mp.nn.loss import infer_loss


@computes_cross_entropy(ignore_index=0, label_smoothing=0.2, reduction="sum")
def marked(output: Any, target: Any) -> Any:
    return F.cross_entropy(output, target, ignore_index=0, label_smoothing=0.2, reduction="sum")


def hooked() -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, output: output * 2)
    return loss


class Own(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("loss_fn", "known"),
    [
        (None, CrossEntropy(counts=True)),
        (F.cross_entropy, CrossEntropy(flat=True)),
        (nn.CrossEntropyLoss(), CrossEntropy(flat=True)),
        (
            nn.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1, reduction="sum"),
            CrossEntropy(flat=True, ignore_index=3, label_smoothing=0.1, reduction="sum"),
        ),
        (marked, CrossEntropy(ignore_index=0, label_smoothing=0.2, reduction="sum")),
    ],
)
def test_losses_that_are_known(loss_fn: Any, known: CrossEntropy) -> None:
    assert known_cross_entropy(loss_fn) == known


@pytest.mark.parametrize(
    ("loss_fn", "why"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(5)), "weighs its classes"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction='none'"),
        (hooked(), "has hooks"),
        (Own(), "not known to be the cross entropy"),
        (lambda output, target: output.sum(), "not known to be the cross entropy"),
        (nn.NLLLoss(), "not known to be the cross entropy"),
    ],
)
def test_losses_that_are_not(loss_fn: Any, why: str) -> None:
    found = known_cross_entropy(loss_fn)
    assert isinstance(found, str)
    assert why in found


@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy, marked])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_what_fits_has_the_same_loss(loss_fn: Any, shape: tuple[int, ...]) -> None:
    hidden, layer, target = torch.randn(*shape[:-1], 7), nn.Linear(7, 5), torch.randint(0, 5, shape[:-1])
    how, output = known_cross_entropy(loss_fn), layer(hidden)
    assert isinstance(how, CrossEntropy)
    assert how.fits(output, target) == (len(shape) == 2 or loss_fn is not F.cross_entropy)
    if how.fits(output, target):
        flat = output.flatten(0, -2), target.flatten()
        theirs = infer_loss(output, target)[1](output, target) if loss_fn is None else loss_fn(*flat)
        torch.testing.assert_close(how.of(hidden, layer.weight, layer.bias, target), theirs)


def test_a_loss_that_counts_is_zero_where_nothing_counts() -> None:
    hidden, layer = torch.randn(6, 7), nn.Linear(7, 5)
    loss, count = CrossEntropy(counts=True).of(hidden, layer.weight, layer.bias, torch.full((6,), -100))
    assert (float(loss), int(count)) == (0.0, 0)


@pytest.mark.parametrize(
    "target", [None, torch.zeros(6), torch.zeros(5, dtype=torch.long), torch.zeros(6, dtype=torch.bool), [1, 2]]
)
@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy, marked])
def test_other_targets_do_not_fit(target: Any, loss_fn: Any) -> None:
    how = known_cross_entropy(loss_fn)
    assert isinstance(how, CrossEntropy)
    assert not how.fits(torch.zeros(6, 5), target)


def test_an_image_s_classes_come_second_where_both_could_be_meant() -> None:
    assert not CrossEntropy(counts=True).fits(torch.zeros(2, 3, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long))


@pytest.mark.parametrize("wrong", [{"reduction": "none"}, {"label_smoothing": 2.0}])
def test_a_mark_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="Allowed: 'mean' or 'sum', and a number from 0 to 1"):
        computes_cross_entropy(**wrong)
