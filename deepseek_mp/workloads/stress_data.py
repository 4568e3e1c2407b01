"""Data of the stress scenarios: noisy answers of a fixed random network, so that no loss can reach zero.

The noise is a floor under the loss, which makes 1 % of the loss a matter of what was learned and not of the last
digits. Targets carry a weight in their last column, which the loss multiplies each example's error by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.workloads.data import Data, ExampleBatches, seeded

NOISE = 0.5
"""Standard deviation of the noise on targets, whose own is 1."""
DECADES = 7.0
"""Between the weights of the first and the last domain of `domain_data`."""
_TEACHER_SEED, _TEACHER_UNITS = 17, 24


def teacher_data(
    *,
    features: int,
    outputs: int,
    batch_size: int,
    seed: int,
    examples: int,
    validation: int = 2048,
    weight: float = 1.0,
) -> Data:
    """Normal inputs [N, features], and targets [N, outputs + 1] of equal weights.

    The teacher and all examples are the same for every seed; the seed is that of the order of the batches.
    """
    inputs = torch.randn(examples + validation, features, generator=seeded(_TEACHER_SEED))
    targets = _answers(inputs, outputs)
    return _split(inputs, targets, torch.full((len(inputs), 1), weight), examples, batch_size, seed)


def domain_data(
    *,
    features: int,
    outputs: int,
    batch_size: int,
    seed: int,
    domains: int = 8,
    decades: float = DECADES,
    examples: int,
    validation: int = 2048,
) -> Data:
    """Examples of several domains, each with features of its own, whose weights fall from one domain to the next.

    Inputs are [N, features] with zeros but for the features of the domain. All domains have one teacher. Validation
    weighs them alike.
    """
    count, own = examples + validation, features // domains
    generator = seeded(_TEACHER_SEED, 1)
    core = torch.randn(count, own, generator=generator)
    domain = torch.randint(domains, (count,), generator=generator)
    inputs = torch.zeros(count, domains, own)
    inputs[torch.arange(count), domain] = core
    weights = 10.0 ** (-decades * domain / (domains - 1))
    weights[examples:] = 1.0
    return _split(inputs.flatten(1), _answers(core, outputs), weights.unsqueeze(1), examples, batch_size, seed)


def weighted_error(outputs: Tensor, target: Tensor) -> Tensor:
    """Mean weighted squared error in fp32: outputs [N, outputs], target [N, outputs + 1] with weights last."""
    error = (outputs.float() - target[:, :-1].float()).square().mean(1)
    return (error * target[:, -1].float()).mean()


def _answers(inputs: Tensor, outputs: int) -> Tensor:
    """The teacher's answers [N, outputs], of mean 0 and variance 1, with noise."""
    generator = seeded(_TEACHER_SEED, 2, inputs.shape[1])
    first = torch.randn(inputs.shape[1], _TEACHER_UNITS, generator=generator) / inputs.shape[1] ** 0.5
    last = torch.randn(_TEACHER_UNITS, outputs, generator=generator)
    clean = torch.relu(inputs @ first) @ last
    clean = (clean - clean.mean(0)) / clean.std(0)
    return clean + NOISE * torch.randn(clean.shape, generator=generator)


def _split(inputs: Tensor, targets: Tensor, weights: Tensor, examples: int, batch_size: int, seed: int) -> Data:
    whole = torch.cat([targets, weights], 1)
    return Data(
        train=ExampleBatches(inputs[:examples], whole[:examples], batch_size=batch_size, seed=seed),
        validation=ExampleBatches(inputs[examples:], whole[examples:], batch_size=512, seed=None),
    )
