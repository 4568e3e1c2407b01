"""What tells one first batch, and its loss, from another."""

import pytest
import torch
from torch import nn

from deepseek_mp.nn.call import parse_batch
from deepseek_mp.profiler.first_batch import digest_of, seeded_loss

X, Y = torch.arange(6.0).view(2, 3), torch.tensor(1)


def test_equal_batches_have_one_digest():
    assert digest_of(parse_batch((X, Y))) == digest_of(parse_batch((X.clone(), Y.clone())))
    assert digest_of(parse_batch((X.t(), Y))) == digest_of(parse_batch((X.t().contiguous(), Y)))
    assert digest_of(parse_batch(X.to_sparse())) == digest_of(parse_batch(X.to_sparse()))


@pytest.mark.parametrize(
    "other", [(X + 1, Y), (X.view(3, 2), Y), (X.bfloat16(), Y), (X, Y + 1), X, {"x": X, "labels": Y + 1}]
)
def test_other_values_sizes_and_types_have_another(other):
    assert digest_of(parse_batch(other)) != digest_of(parse_batch((X, Y)))


def test_the_loss_is_that_of_the_seed_and_nothing_is_left_of_it():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    device, mean = torch.device("cpu"), model[0].running_mean.clone()
    first = seeded_loss(model, lambda: model(X).square().sum(), device, 1)
    state = torch.get_rng_state()
    assert seeded_loss(model, lambda: model(X).square().sum(), device, 1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].running_mean, mean)
    torch.rand(3)
    assert seeded_loss(model, lambda: model(X).square().sum(), device, 1) == first
