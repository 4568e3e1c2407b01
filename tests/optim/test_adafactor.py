import io

import pytest
import torch
from torch import nn
from whole_state import everything, same, skip_a_step

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim import Adafactor, footprint, set_storage
from deepseek_mp.precision.storage import StorageFormat

CASES = [
    {},
    {"lr": 0.05, "weight_decay": 0.1},
    {"eps": (1e-8, 1e-2), "d": 2.0, "beta2_decay": -0.5},
    {"lr": torch.tensor(0.02)},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("skippable", [False, True])
def test_fp32_parameters_move_as_in_pytorch(net, train, options, skippable):
    ours, theirs = net(), net()
    optimizer = Adafactor(ours.parameters(), **options)
    if skippable:
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
    train(ours, optimizer)
    train(theirs, torch.optim.Adafactor(theirs.parameters(), **options))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["bf16_kahan", "bf16_sr"])
def test_bf16_parameters_follow_fp32_ones(net, train, storage):
    exact, stored = net(), net(torch.bfloat16)
    exact.load_state_dict(stored.state_dict())
    train(exact, Adafactor(exact.parameters(), lr=2e-4), 60)
    train(stored, Adafactor(stored.parameters(), lr=2e-4, storage=storage), 60)
    start = net(torch.bfloat16)[0].weight.float()
    moved, followed = exact[0].weight - start, stored[0].weight.float() - start
    assert ((moved * followed).sum() / moved.square().sum()).item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
@pytest.mark.parametrize("trained", [0, 3])
def test_a_step_skipped_by_the_device_leaves_everything(net, train, storage, trained):
    model = net()
    optimizer = Adafactor(model.parameters(), weight_decay=0.1)
    for parameter in model.parameters():
        set_storage(optimizer, parameter, storage)
    train(model, optimizer, trained)
    before = everything(model, optimizer)
    skip_a_step(model, optimizer)
    after = everything(model, optimizer)
    assert same(before[:4], after[:4])
    assert not trained or same(before, after)
    optimizer.found_inf = torch.zeros(())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    optimizer.step()
    assert all(value.isfinite().all() for value in everything(model, optimizer))
    assert not same(before[:4], everything(model, optimizer)[:4])


def test_resume_has_the_same_bits(net, train):
    model = net()
    optimizer = Adafactor(model.parameters())
    set_storage(optimizer, model[0].weight, "bf16_sr")
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 4, start=4)
    file.seek(0)
    weights, state = torch.load(file)
    resumed = net()
    again = Adafactor(resumed.parameters())
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(resumed, again, 4, start=4)
    assert same(everything(model, optimizer), everything(resumed, again))


def test_rows_and_columns_are_kept_of_matrices_and_of_convolutions():
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((30, 20), (8, 4, 3, 3), (7,))]
    optimizer = Adafactor(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert footprint(optimizer)[StorageFormat.FP32].state == 4 * (30 + 20 + 8 + 36 + 7 + 3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"eps": (-1.0, 1e-3)}, "eps=-1.0"),
        ({"beta2_decay": 0.8}, "beta2_decay=0.8"),
        ({"d": 0.5}, "d=0.5"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_refuses_what_is_out_of_range(net, options, match):
    with pytest.raises(ConfigError, match=match):
        Adafactor(net().parameters(), **options)
