import pytest
import torch
from whole_state import everything, same, skip_a_step

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim import SGD

CASES = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True},
    {"lr": torch.tensor(0.05), "momentum": 0.5},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("skippable", [False, True])
def test_fp32_parameters_move_as_in_pytorch(net, train, options, skippable):
    ours, theirs = net(), net()
    optimizer = SGD(ours.parameters(), **{"lr": 0.1, **options})
    if skippable:
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
    train(ours, optimizer)
    train(theirs, torch.optim.SGD(theirs.parameters(), **{"lr": 0.1, **options}))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", CASES)
def test_fp32_parameters_have_the_bits_of_pytorchs_foreach(net, train, options):
    ours, theirs = net(), net()
    for model, kind, how in ((ours, SGD, {}), (theirs, torch.optim.SGD, {"foreach": True})):
        model.late = torch.nn.Parameter(torch.linspace(-1, 1, 5))  # makes its first step beside the fourth of others
        optimizer = kind(model.parameters(), **{"lr": 0.1, **options, **how})
        train(model[:3], optimizer, 3)
        for step in range(3):
            for param in model.parameters():
                param.grad = param.detach() * (step + 0.3)
            optimizer.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_skipped_step_leaves_the_momentum_without_weight_decay(net, train, nesterov):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    skip_a_step(model, optimizer)
    assert same(before, everything(model, optimizer))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"nesterov": True}, "nesterov=True with momentum=0.0"),
    ],
)
def test_refuses_what_is_out_of_range(net, options, match):
    with pytest.raises(ConfigError, match=match):
        SGD(net().parameters(), **options)
