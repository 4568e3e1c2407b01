"""The data of the stress scenarios: learnable, with a floor of noise, and with weights as they are asked for."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.workloads.data import Data
from deepseek_mp.workloads.stress_data import NOISE, domain_data, teacher_data, weighted_error

SIZES = {"features": 16, "outputs": 3, "batch_size": 32, "examples": 256, "validation": 128}


def whole(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [data.validation.batch(0, index) for index in range(len(data.validation))]
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([target for _, target in batches])


@pytest.mark.parametrize("made", [teacher_data, domain_data])
def test_the_examples_are_the_same_for_every_seed_and_their_order_is_not(made: object) -> None:
    first, again, other = (made(**SIZES, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(whole(first), whole(other), strict=True))
    assert torch.equal(first.train.batch(0, 0)[0], again.train.batch(0, 0)[0])
    assert not torch.equal(first.train.batch(0, 0)[0], other.train.batch(0, 0)[0])
    assert len(first.train) == 8


def test_targets_are_a_function_of_the_inputs_plus_noise_of_the_promised_size() -> None:
    data = teacher_data(**{**SIZES, "examples": 8192, "validation": 4096}, seed=0)
    _, target = whole(data)
    answers = target[:, :-1]
    assert answers.mean(0).abs().max() < 0.1
    assert answers.var(0).sub(1 + NOISE**2).abs().max() < 0.1
    assert target[:, -1].eq(1).all()


def test_a_weight_is_that_of_every_example() -> None:
    data = teacher_data(**SIZES, seed=0, weight=0.25)
    assert data.train.batch(0, 0)[1][:, -1].eq(0.25).all()
    assert whole(data)[1][:, -1].eq(0.25).all()


def test_domains_have_features_of_their_own_and_weights_over_the_decades() -> None:
    data = domain_data(**{**SIZES, "examples": 4096}, seed=0, domains=4, decades=6.0)
    inputs, target = data.train.inputs.view(-1, 4, 4), data.train.targets
    used = inputs.abs().sum(2) > 0
    assert used.sum(1).eq(1).all()
    domain = used.float().argmax(1)
    assert torch.allclose(target[:, -1].log10(), -2.0 * domain)
    assert whole(data)[1][:, -1].eq(1).all()


def test_the_loss_is_the_mean_of_weighted_squares() -> None:
    outputs = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16)
    target = torch.tensor([[0.0, 0.0, 2.0], [4.0, 0.0, 0.5]])
    loss = weighted_error(outputs, target)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx((2.0 * 5.0 + 0.5 * 8.0) / 2)
