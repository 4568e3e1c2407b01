import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.stored import random_bits, round_by_bits
from deepseek_mp.optim import SGD, AdamW, set_storage


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(64, 64))


def value(optimizer, parameter):
    kept = optimizer.state[parameter].get("compensation")
    return parameter.detach().float() + (0 if kept is None else kept)


def test_the_object_stays_and_its_type_changes(weight):
    optimizer = AdamW([weight])
    for format, dtype in (("bf16_sr", torch.bfloat16), ("bf16_kahan", torch.bfloat16), ("fp32", torch.float32)):
        set_storage(optimizer, weight, format)
        assert weight.dtype is dtype
        assert optimizer.storage(weight) == format
        assert optimizer.param_groups[0]["params"][0] is weight
    assert "compensation" not in optimizer.state[weight]


@pytest.mark.parametrize("old", ["bf16_sr", "bf16_kahan"])
def test_promotion_is_exact(net, train, old):
    model = net(torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-5, storage=old)
    train(model, optimizer, 5)
    weight = model[0].weight
    before, moments = value(optimizer, weight), optimizer.state[weight]["exp_avg"].clone()
    set_storage(optimizer, weight, "fp32")
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], moments)


def test_a_promoted_parameter_takes_the_step_it_would_have_taken(net, train):
    ends = []
    for format in ("bf16_kahan", "fp32"):
        model = net(torch.bfloat16)
        optimizer = SGD(model.parameters(), lr=1e-4)
        train(model, optimizer, 5)
        for parameter in model.parameters():
            set_storage(optimizer, parameter, format)
            parameter.grad = torch.full_like(parameter, 1e-2, dtype=torch.float32)
        optimizer.step()
        ends.append([value(optimizer, p) for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-16, atol=0)


def test_demotion_splits_or_rounds_by_chance(weight):
    exact = weight.detach().clone()
    optimizer = AdamW([weight])
    set_storage(optimizer, weight, "bf16_kahan")
    torch.testing.assert_close(value(optimizer, weight), exact, rtol=2**-16, atol=0)
    set_storage(optimizer, weight, "bf16_sr")
    error = weight.detach().float() - exact
    assert (error.abs() < exact.abs() * 2**-7).all()
    up = (weight.detach() != exact.bfloat16()).float().mean()
    assert 0.1 < up < 0.4  # not to the nearest; a quarter goes to the other neighbour


def test_a_conversion_does_not_share_its_random_bits_with_a_step(weight):
    exact, steps = weight.detach().clone(), [1 << 31, 0]
    set_storage(AdamW([weight], seed=7), weight, "bf16_sr")
    of_conversion, of_step = random_bits([weight.numel()] * 2, [0, 0], steps, seed=7)
    assert torch.equal(weight, round_by_bits(exact, of_conversion))
    assert not torch.equal(weight, round_by_bits(exact, of_step))


def test_a_gradient_is_kept(weight):
    optimizer = AdamW([weight])
    weight.grad = torch.randn_like(weight)
    gradient = weight.grad
    for format in ("bf16_sr", "fp32"):
        set_storage(optimizer, weight, format)
        assert torch.equal(weight.grad, gradient)
        assert weight.grad.dtype is torch.float32


def test_memory_format_stays():
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = AdamW([weight])
    strides = weight.stride()
    for format in ("bf16_sr", "bf16_kahan", "fp32"):
        set_storage(optimizer, weight, format)
        assert weight.stride() == strides


def test_refuses_what_would_lose_updates(weight):
    with pytest.raises(ConfigError, match="an optimizer AdamW, which would lose small updates"):
        set_storage(torch.optim.AdamW([weight]), weight, "bf16_sr")
    with pytest.raises(ConfigError, match=r"does not train"):
        set_storage(AdamW([nn.Parameter(torch.ones(1))]), weight, "bf16_sr")
    with pytest.raises(ConfigError, match="unknown storage format 'bf16'"):
        set_storage(AdamW([weight]), weight, "bf16")
    double = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"torch\.float64"):
        set_storage(AdamW([double]), double, "bf16_sr")
