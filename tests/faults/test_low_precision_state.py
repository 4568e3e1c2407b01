"""What must not be kept in 16 bits: summed gradients, optimizer states, running statistics.

C03 to C05 in the names are numbers in the project's list of faults. Tests with `theirs` in the name show
what plain PyTorch does.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.errors import PlanError
from deepseek_mp.trainer import state

LARGEST = {"bf16": 256.0, "fp16": 2048.0}
"""Where adding one is lost in the format."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def one_weight():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    return model


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3)


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


def test_c04_a_state_is_loaded_in_the_format_it_was_saved_in():
    model, optimizer, low, low_optimizer = with_fp32_state(torch.bfloat16)
    tensors, values = state.optimizer_state(model, optimizer)
    state.load_optimizer(low, low_optimizer, tensors, values)
    assert low_optimizer.state[low.weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(low_optimizer.state[low.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_c04_theirs_it_is_cast_to_the_format_of_the_parameter():
    _, optimizer, low, low_optimizer = with_fp32_state(torch.bfloat16)
    low_optimizer.load_state_dict(optimizer.state_dict())
    assert low_optimizer.state[low.weight]["exp_avg"].dtype == torch.bfloat16


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
