"""The rule is that of `torch.optim.AdamW`, whose groups and states it has."""

import pytest
import torch
from torch import nn

from deepseek_mp.optim import AdamW
from deepseek_mp.optim.offload import rule


def group_of(lr=0.01):
    return {"lr": lr, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def step(group, weight, gradient, state):
    state["step"].add_(1)
    rule.step(group, [weight], [gradient], [rule.moments_of(state)], [state["step"]])


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_is_pytorchs_fused_adamw(lr):
    theirs, own = nn.Parameter(torch.randn(37)), None
    own = nn.Parameter(theirs.detach().clone())
    reference = torch.optim.AdamW([theirs], fused=True, **group_of(float(lr)))
    state = rule.new_state([torch.randn(37), torch.randn(37)])
    for _ in range(3):
        theirs.grad = torch.randn(37)
        reference.step()
        with torch.no_grad():
            step(group_of(lr), own, theirs.grad, state)
    assert torch.equal(theirs, own)
    assert list(state) == list(reference.state[theirs])
    assert all(torch.equal(state[key], reference.state[theirs][key]) for key in state)


def test_agrees_with_the_optimizer_for_stored_weights_but_for_rounding():
    theirs = nn.Parameter(torch.randn(1000))
    own = nn.Parameter(theirs.detach().clone())
    reference = AdamW([theirs], **group_of())
    state = rule.new_state([torch.empty(1000), torch.empty(1000)])
    for _ in range(5):
        theirs.grad = torch.randn(1000)
        reference.step()
        with torch.no_grad():
            step(group_of(), own, theirs.grad, state)
    assert torch.allclose(theirs, own, rtol=1e-6, atol=1e-7)


def test_groups_have_the_options_of_pytorchs():
    parameter = nn.Parameter(torch.zeros(1))
    names = set(torch.optim.AdamW([parameter]).param_groups[0]) - {"params"}
    assert set(rule.OPTIONS) | set(group_of()) == names


def test_options_are_those_of_now():
    group = group_of(torch.tensor(0.5))
    found = rule.options([group])
    group["lr"].fill_(1.0)
    assert found[0]["lr"] == 0.5


def test_the_counter_of_a_state_on_a_device_is_on_the_host():
    """PyTorch's `foreach` kernels read it for each parameter, and would wait for the device each time."""
    state = rule.new_state([torch.empty(3, device="meta")] * 2)
    assert (state["step"].device.type, state["exp_avg"].device.type) == ("cpu", "meta")


def test_counters_are_read_only():
    weight, counter = torch.randn(5), torch.tensor(4.0)
    rule.step(group_of(), [weight], [torch.randn(5)], [(torch.zeros(5), torch.zeros(5))], [counter])
    assert counter == 4.0


class Elsewhere(torch.Tensor):
    """A tensor of another device, as far as the step asks."""

    @property
    def device(self):
        return torch.device("meta")


def test_another_device_makes_the_same_step_and_counts_as_little(monkeypatch):
    given = [torch.randn(5) for _ in range(2)] + [torch.rand(5) for _ in range(2)]
    ours, theirs = ([value.clone() for value in given] for _ in range(2))
    counter = torch.tensor(4.0)
    rule.step(group_of(), [theirs[0]], [theirs[1]], [theirs[2:]], [counter])
    real = rule.adamw
    monkeypatch.setattr(
        rule, "adamw", lambda weights, *rest, **how: real([w.as_subclass(torch.Tensor) for w in weights], *rest, **how)
    )
    rule.step(group_of(), [ours[0].as_subclass(Elsewhere)], [ours[1]], [ours[2:]], [counter])
    assert counter == 4.0
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
