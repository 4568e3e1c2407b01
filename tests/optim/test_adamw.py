import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.block_states import SIGNED, UNSIGNED, decode, encode
from deepseek_mp.optim import AdamW, adamw


@pytest.mark.parametrize("options", [{}, {"lr": 0.02, "weight_decay": 0.0}, {"betas": (0.5, 0.9)}])
def test_fp32_parameters_get_the_bits_of_pytorch(net, train, options):
    ours, theirs = net(), net()
    train(ours, AdamW(ours.parameters(), **options))
    train(theirs, torch.optim.AdamW(theirs.parameters(), foreach=True, **options))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_and_a_schedule_as_in_pytorch(net, train):
    models, rates = [], []
    for kind in (AdamW, torch.optim.AdamW):
        model = net()
        optimizer = kind([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.01], total_steps=30)
        train(model, optimizer, scheduler=scheduler)
        models.append(model)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == rates[1]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_steps_that_the_device_may_skip_come_to_the_same(net, train):
    ours, theirs = net(), net()
    optimizer = AdamW(ours.parameters())
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
    train(ours, optimizer)
    train(theirs, torch.optim.AdamW(theirs.parameters()))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"lr": torch.ones(2)}, "lr of shape"),
        ({"storage": "bf16"}, "storage='bf16'.*bf16_kahan, bf16_sr"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_refuses_what_is_out_of_range(net, options, match):
    with pytest.raises(ConfigError, match=match):
        AdamW(net().parameters(), **options)


def by_definition(parameter, grad, now):
    """What `FusedStep` says a kernel does, in fp32; but moments are kept to the nearest code."""
    if now.skip is not None and now.skip:
        return
    (beta1, beta2), g = now.betas, grad.float().view(-1) / (1 if now.scale is None else now.scale)
    m, v = decode(now.first), decode(now.second)
    m, v = m + (1 - beta1) * (g - m), beta2 * v + (1 - beta2) * g**2
    parameter.view(-1).mul_(now.decay).sub_(now.size * m / (v.sqrt() / now.root + now.eps))
    for held, value, kind in ((now.first, m, SIGNED), (now.second, v, UNSIGNED)):
        for old, new in zip(held, encode(value, kind), strict=True):
            old.copy_(new)


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)])
@pytest.mark.parametrize("skipped", [None, {0, 2}])
def test_a_kernel_is_given_the_numbers_of_the_step(monkeypatch, rate, skipped):
    found = []
    for kernel in (None, by_definition):
        monkeypatch.setattr(adamw, "fused_adamw", lambda _, kernel=kernel: kernel)
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 64))
        optimizer = AdamW([weight], lr=rate, states="8bit", weight_decay=0.1)
        for step in range(4):
            weight.grad = torch.randn(64, 64)
            if skipped is not None:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(step in skipped))
            optimizer.step()
        assert float(optimizer.state[weight]["step"]) == 4 - len(skipped or ())
        found.append(weight.detach().clone())
    torch.testing.assert_close(*found, rtol=0.0, atol=2e-3)  # of steps of 1e-2, with moments of one code more or less
