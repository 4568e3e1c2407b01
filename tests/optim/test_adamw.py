import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim import AdamW


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
