"""The network of the stress scenarios: its shapes, its seed, and a gain that changes nothing."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.workloads.stress_models import ResidualConfig, residual_net

SMALL = ResidualConfig(features=8, width=16, hidden=32, outputs=4)


@pytest.mark.parametrize("gated", [False, True])
def test_outputs_have_their_shape_and_every_weight_learns(gated: bool) -> None:
    net = residual_net(ResidualConfig(features=8, width=16, hidden=32, outputs=4, layers=3, gated=gated))
    outputs = net(torch.randn(5, 8))
    outputs.square().sum().backward()
    assert outputs.shape == (5, 4)
    assert len(net.blocks) == 3
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())
    assert ("blocks.0.gate.weight" in dict(net.named_parameters())) == gated


def test_weights_follow_from_the_seed_and_the_callers_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (residual_net(SMALL, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_a_gain_makes_hidden_activations_larger_and_nothing_else() -> None:
    plain = residual_net(SMALL)
    loud = residual_net(ResidualConfig(features=8, width=16, hidden=32, outputs=4, gain=1024.0))
    inputs, largest = torch.randn(5, 8), []
    for net in (plain, loud):
        net.blocks[0].down.register_forward_pre_hook(lambda _, args: largest.append(args[0].detach().max()))
    assert torch.equal(plain(inputs), loud(inputs))
    assert largest[1] == 1024 * largest[0]
