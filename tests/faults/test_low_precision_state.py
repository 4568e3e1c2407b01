"""What must not be kept in few bits as it is: weights, summed gradients, optimizer states, averages, statistics.

C01 to C05 in the names are numbers in the project's list of faults. Tests with `theirs` in the name show
what plain PyTorch does.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deepseek_mp import PrecisionMonitor
from deepseek_mp.errors import PlanError
from deepseek_mp.monitor import Sampling
from deepseek_mp.ops.block_states import BLOCK, encode
from deepseek_mp.optim import SGD, AdamW
from deepseek_mp.optim import states as states_module
from deepseek_mp.optim.states import moment_rows
from deepseek_mp.trainer import state
from deepseek_mp.trainer.ema import WeightAverage

LARGEST = {"bf16": 256.0, "fp16": 2048.0}
"""Where adding one is lost in the format."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def one_weight():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    return model


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3)


def moved(optimizer, weight, steps):
    """How far a gradient of one has moved the weight."""
    start = weight.detach().double().mean()
    for _ in range(steps):
        weight.grad = torch.ones_like(weight, dtype=weight.grad_dtype)
        optimizer.step()
    return (start - weight.detach().double().mean()).item()


def ones(dtype=torch.bfloat16):
    """Enough of them for moments in blocks."""
    return nn.Parameter(torch.ones(16, BLOCK, dtype=dtype))


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("storage", ["bf16_kahan", "bf16_sr"])
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_c01_updates_below_half_a_bit_arrive(kind, storage, states):
    weight = ones()
    options = {"momentum": 0.5} if kind is SGD else {"weight_decay": 0.0}
    rate = 5e-5 if kind is SGD else 1e-4
    optimizer = kind([weight], lr=rate, storage=storage, states=states, **options)
    assert moved(optimizer, weight, 300) == pytest.approx(300e-4, abs=2e-3)  # half of BF16's step


@pytest.mark.parametrize(("dtype", "rate", "share"), [("bf16", 1e-3, 0.0), ("bf16", 3e-3, 2 / 3), ("fp16", 1e-4, 0.0)])
def test_c01_theirs_updates_below_half_a_bit_are_lost(dtype, rate, share):
    weight = ones(DTYPES[dtype])
    found = moved(torch.optim.AdamW([weight], lr=rate, weight_decay=0.0), weight, 1000)
    assert found == pytest.approx(share * 1000 * rate, rel=0.05)


@pytest.mark.parametrize("mode", DTYPES)
def test_c01_updates_of_a_mixed_run_arrive_in_fp32_weights(mode, make_trainer):
    model = one_weight()
    nn.init.ones_(model[0].weight)
    trainer = make_trainer(
        mode, 1.0, model=model, scheduler=None, loss_fn=lambda output, target: output.sum(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
    )  # fmt: skip
    for _ in range(50):
        trainer.step(torch.ones(1, 1))
    trainer.settle()
    assert model[0].weight.dtype is torch.float32
    assert model[0].weight.item() == pytest.approx(1 - 50e-4, abs=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW])
def test_c01_lost_updates_are_measured_and_raise_an_alarm_where_nobody_keeps_them(kind):
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).bfloat16()
    nn.init.ones_(model[0].weight)
    optimizer = kind(model.parameters(), lr=1e-4, weight_decay=0.0)
    with PrecisionMonitor(model, optimizer, sample_every=None, sampling=Sampling(every=1)) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 16, dtype=torch.bfloat16)).float().sum().backward()
            optimizer.step()
        alarms = [(alarm.layer, alarm.tensor, alarm.kind, alarm.value) for alarm in monitor.alarms]
    assert (model[0].weight == 1).all()
    assert alarms == ([("0", "update", "lost", 1.0)] if kind is torch.optim.AdamW else [])


def second_moment(optimizer, weight, steps):
    """The second moment after gradients of one."""
    for _ in range(steps):
        weight.grad = torch.ones_like(weight, dtype=weight.grad_dtype)
        optimizer.step()
    return moment_rows(optimizer.state[weight], "exp_avg_sq", weight).float().mean().item()


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_c02_a_second_moment_grows_to_the_square_of_the_gradient(states):
    weight = ones()
    found = second_moment(AdamW([weight], states=states), weight, steps=1200)
    assert found == pytest.approx(1 - 0.999**1200, rel=1e-4)  # 0.7


def test_c02_theirs_it_stands_still_below():
    weight = ones()
    assert second_moment(torch.optim.AdamW([weight]), weight, steps=1200) <= 0.5


@pytest.mark.parametrize("storage", ["bf16_kahan", "bf16_sr"])
def test_c02_a_slow_average_of_bf16_weights_moves(storage):
    model = one_weight().bfloat16()
    AdamW(model.parameters(), storage=storage)
    average = WeightAverage(model, decay=0.9999)
    nn.init.ones_(model[0].weight)
    for _ in range(1000):
        average.update()
    assert average.values["0.weight"].item() == pytest.approx(1 - 0.9999**1000, rel=1e-3)


def test_c02_theirs_a_slow_average_in_bf16_stands_still():
    model = one_weight().bfloat16()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    average.update_parameters(model)  # the first one copies
    nn.init.ones_(model[0].weight)
    for _ in range(1000):
        average.update_parameters(model)
    assert average.module[0].weight.item() < 0.04  # of 0.095


def fallen():
    """The second moment in blocks of values whose gradients became a tenth, beside one in each block that stayed."""
    weight = ones(torch.float32)
    optimizer = AdamW([weight], betas=(0.9, 0.99), states="8bit")
    gradient = torch.ones_like(weight)
    for step in range(800):
        weight.grad = gradient
        optimizer.step()
        if step == 100:
            gradient[:, 1:] = 0.1
    return moment_rows(optimizer.state[weight], "exp_avg_sq", weight)[:, 1:].mean().item()


def test_c02_a_second_moment_in_blocks_falls_beside_one_that_stays():
    assert fallen() == pytest.approx(0.01, rel=0.1)


def test_c02_theirs_rounded_to_nearest_it_stands_still(monkeypatch):
    monkeypatch.setattr(states_module, "encode", lambda value, kind, *_: encode(value, kind))
    assert fallen() > 0.1


@pytest.mark.parametrize("pin", [None, {"0": "fp32"}], ids=["region", "pinned"])
@pytest.mark.parametrize("mode", LARGEST)
def test_c03_gradients_of_a_window_are_summed_in_fp32(mode, pin, make_trainer):
    """A gradient of 256 (2048) and then fifty of 1: no format of 16 bits can hold the sum on the way."""
    trainer = make_trainer(
        mode, 1.0, model=one_weight(), pin=pin, gradient_accumulation_steps=51, scheduler=None,
        loss_fn=lambda output, target: output.sum(), optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )  # fmt: skip
    weight = trainer.model[0].weight
    for i in range(51):
        assert weight.grad is None or weight.grad.dtype == torch.float32
        trainer.step(torch.full((1, 1), LARGEST[mode] if i == 0 else 1.0))
    assert weight.item() == pytest.approx(-(LARGEST[mode] + 50) / 51, rel=1e-6)


@pytest.mark.parametrize("storage", ["bf16_kahan", "bf16_sr"])
def test_c03_gradients_of_weights_stored_in_bf16_are_summed_in_fp32(storage):
    weight = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    AdamW([weight], storage=storage)
    for i in range(51):
        (weight * (256.0 if i == 0 else 1.0)).backward()
    assert weight.grad.item() == 256 + 50


@pytest.mark.parametrize("mode", LARGEST)
def test_c03_theirs_a_gradient_in_16_bits_stands_still(mode):
    weight = nn.Parameter(torch.zeros((), dtype=DTYPES[mode]))
    for i in range(51):
        (weight * (LARGEST[mode] if i == 0 else 1.0)).backward()
    assert weight.grad.item() == LARGEST[mode]


@pytest.mark.parametrize("mode", LARGEST)
def test_c04_an_fp32_run_resumed_in_16_bits_keeps_its_optimizer_state_bit_by_bit(
    mode, make_trainer, make_batches, tmp_path
):
    first = make_trainer("fp32", run_dir=tmp_path, optimizer=adamw)
    first.fit(make_batches(3))
    second = make_trainer(mode, optimizer=adamw)
    second.fit(make_batches(3), epochs=1, resume=tmp_path)  # nothing is left to train
    states = [list(trainer.optimizer.state.values()) for trainer in (first, second)]
    for saved, loaded in zip(*states, strict=True):
        assert loaded["exp_avg"].dtype == loaded["exp_avg_sq"].dtype == torch.float32
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def with_fp32_state(dtype):
    """A model of that dtype, and the optimizer state of its fp32 twin."""
    model = nn.Linear(4, 3)
    optimizer = adamw(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    low = nn.Linear(4, 3).to(dtype)
    return model, optimizer, low, adamw(low.parameters())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_c04_a_state_is_loaded_in_the_format_it_was_saved_in(dtype):
    model, optimizer, low, low_optimizer = with_fp32_state(dtype)
    tensors, values = state.optimizer_state(model, optimizer)
    state.load_optimizer(low, low_optimizer, tensors, values)
    assert low_optimizer.state[low.weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(low_optimizer.state[low.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


@pytest.mark.parametrize("storage", ["bf16_kahan", "bf16_sr"])
def test_c04_moments_of_the_optimizers_here_are_loaded_in_fp32_beside_bf16_weights(storage):
    _, optimizer, low, _ = with_fp32_state(torch.bfloat16)
    loaded = AdamW(low.parameters(), storage=storage)
    loaded.load_state_dict(optimizer.state_dict())
    saved = list(optimizer.state.values())
    for kept, expected in zip(loaded.state.values(), saved, strict=True):
        assert kept["exp_avg"].dtype == torch.float32
        assert torch.equal(kept["exp_avg"], expected["exp_avg"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_c04_theirs_it_is_cast_to_the_format_of_the_parameter(dtype):
    _, optimizer, low, low_optimizer = with_fp32_state(dtype)
    low_optimizer.load_state_dict(optimizer.state_dict())
    assert low_optimizer.state[low.weight]["exp_avg"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_c05_a_model_converted_as_a_whole_is_refused_with_what_to_do(dtype, make_model, make_trainer):
    model = make_model().to(dtype)
    with pytest.raises(PlanError, match=r"running statistics in fp32.*Call model\.float\(\) first"):
        make_trainer("bf16", model=model)
    only_the_norm = make_model()
    only_the_norm.body[1].to(dtype)
    with pytest.raises(PlanError, match=r"'body\.1\.weight' is stored in"):
        make_trainer("bf16", model=only_the_norm)
    assert only_the_norm.body[1].running_var.dtype == dtype  # and it is as it was


def normalised(momentum):
    """A product in the region's format, then the norm: its input is of 16 bits."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, momentum=momentum))
    nn.init.eye_(model[0].weight)
    return model


@pytest.mark.parametrize("mode", DTYPES)
def test_c05_running_statistics_stay_fp32_and_right(mode, make_trainer):
    model = normalised(momentum=1.0)
    trainer = make_trainer(mode, 1.0, model=model, loss_fn=lambda output, target: output.float().square().mean())
    x = torch.randn(256, 2) * 3000
    seen = []
    handle = model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert trainer.step(x).status == "applied"
    handle.remove()
    assert seen == [DTYPES[mode]]
    assert {tensor.dtype for tensor in (*model[1].parameters(), model[1].running_mean, model[1].running_var)} == {
        torch.float32
    }
    torch.testing.assert_close(model[1].running_var, x.var(0), rtol=0.02, atol=0.0)  # about 9e6, above fp16
    assert trainer.predict(x).abs().max() > 1.0


def test_c05_theirs_the_variance_overflows_in_fp16_and_the_output_is_zero():
    norm, x = nn.BatchNorm1d(2, momentum=1.0).half(), (torch.randn(256, 2) * 3000).half()
    norm(x)
    assert norm.running_var.isinf().all()
    assert norm.eval()(x).abs().max() == 0.0


@pytest.mark.parametrize("mode", DTYPES)
def test_c05_a_slow_running_mean_moves(mode, make_trainer):
    model = normalised(momentum=1e-3)
    model[1].running_mean.fill_(0.5)
    trainer = make_trainer(
        mode, 1.0, model=model, scheduler=None, optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        loss_fn=lambda output, target: output.float().square().mean(),
    )  # fmt: skip
    x = torch.randn(64, 2) + 1.0
    for _ in range(5):
        trainer.step(x)
    stays = 0.999**5
    torch.testing.assert_close(model[1].running_mean, stays * 0.5 + (1 - stays) * x.mean(0), rtol=0.0, atol=2e-5)


def test_c05_theirs_in_bf16_it_stands_still():
    norm = nn.BatchNorm1d(2, momentum=1e-3).bfloat16()
    norm.running_mean.fill_(0.5)
    for _ in range(5):
        norm((torch.randn(64, 2) + 1.0).bfloat16())
    assert norm.running_mean.tolist() == [0.5, 0.5]
