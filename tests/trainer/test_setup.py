"""What a user may leave out, and what is refused, with the model as it was."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from deepseek_mp import PrecisionPlan, backends, convert
from deepseek_mp.controller import DynamicLossScale
from deepseek_mp.errors import ConfigError
from deepseek_mp.nn import current_plan, kernels_in_force
from deepseek_mp.trainer.setup import (
    align_optimizer,
    check_arguments,
    choose_device,
    make_optimizer,
    make_scaler,
    make_scheduler,
    seed_everything,
    unchanged_if_refused,
)

CPU = torch.device("cpu")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


# -- arguments and plans ------------------------------------------------------------------------------


def loss(output, target):
    return output.mean()


@pytest.mark.parametrize("loss_fn", [None, loss, nn.MSELoss()])
def test_a_module_and_a_function_are_taken(loss_fn):
    check_arguments(model(), loss_fn)


@pytest.mark.parametrize(
    ("given", "loss_fn", "message"),
    [
        ("resnet", None, r"model='resnet'\. Allowed: a torch\.nn\.Module\. Pass the model object"),
        (nn.Linear, None, "model=<class"),
        (nn.Linear(2, 2, device="meta"), None, "a model on the meta device.*to_empty"),
        (nn.Linear(2, 2), "mse", "loss_fn='mse'.*not a name or class"),
        (nn.Linear(2, 2), nn.MSELoss, "loss_fn=<class"),
    ],
)
def test_other_models_and_losses_are_refused(given, loss_fn, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(given, loss_fn)


# -- a refused construction ----------------------------------------------------------------------------


def test_whatever_is_refused_leaves_classes_tensors_and_random_numbers_alone():
    made = model()
    objects = [id(p.data.untyped_storage()._cdata) for p in made.parameters()], [id(b) for b in made.buffers()]
    values = {name: value.clone() for name, value in made.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def refused():
        convert(made, "bf16", emulate=True)
        seed_everything(3)
        made.to(torch.float64)
        made[1].running_mean = torch.ones(3)
        raise KeyboardInterrupt("no")

    with pytest.raises(KeyboardInterrupt, match="no"), unchanged_if_refused(made, CPU):
        refused()
    assert [type(module) for module in made] == [nn.Linear, nn.BatchNorm1d, nn.Linear]
    assert current_plan(made) is None
    assert objects[1] == [id(b) for b in made.buffers()]
    assert all(torch.equal(value, values[name]) for name, value in made.state_dict().items())
    assert all(p.dtype == torch.float32 for p in made.parameters())
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())


def test_a_plan_that_was_in_force_is_so_again():
    made = model()
    before = convert(made, PrecisionPlan.of("bf16", {"2": "fp32"}), emulate=True)

    def refused():
        convert(made, "fp32")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), unchanged_if_refused(made, CPU):
        refused()
    assert current_plan(made) == before
    assert made[2].unit_precision.region == "fp32"


def test_the_kernels_of_a_plan_that_was_in_force_are_so_again():
    made = model()
    convert(made, "fp32", kernels="reference")

    def refused():
        convert(made, "fp32")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), unchanged_if_refused(made, CPU):
        refused()
    assert kernels_in_force(made) == "reference"


def test_what_is_not_refused_stays():
    made = model()
    with unchanged_if_refused(made, CPU):
        convert(made, "fp32")
    assert current_plan(made) is not None


# -- device ------------------------------------------------------------------------------------------------


def test_the_device_is_the_one_asked_for_or_the_best_there_is(monkeypatch):
    assert choose_device(model(), "cpu") == CPU
    assert choose_device(model(), CPU) == CPU
    monkeypatch.setattr(backends, "default_device", lambda: torch.device("xpu"))
    assert choose_device(model(), None) == torch.device("xpu")
    assert choose_device(nn.Identity(), None) == torch.device("xpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "tpu9"])
def test_a_device_that_torch_does_not_know_is_an_error(device):
    with pytest.raises(ConfigError, match=rf"device '{device}' is not known.*Allowed: .*cpu"):
        choose_device(model(), device)


def test_a_device_that_this_machine_does_not_have_is_an_error(monkeypatch):
    for backend in backends.detect.BUILT_IN:
        if backend.device_type == "cuda":
            monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no 'cuda' device can be used.*Allowed: .*cpu"):
        choose_device(model(), "cuda")


def test_a_device_on_which_nothing_is_computed_is_an_error():
    with pytest.raises(ConfigError, match=r"device 'meta'.*Allowed: a device that computes"):
        choose_device(model(), "meta")


# -- optimizer ------------------------------------------------------------------------------------------------


def test_the_default_is_adamw_over_what_is_trained_fused_where_there_is_a_kernel():
    made = model()
    made[0].requires_grad_(False)
    optimizer = make_optimizer(None, made)
    assert type(optimizer) is torch.optim.AdamW
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in made.parameters() if p.requires_grad]
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["fused"] is True


def test_the_default_does_without_a_kernel_that_is_not_there(monkeypatch):
    kind = torch.optim.AdamW

    def without_kernel(params, *, lr, fused=False):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point")
        return kind(params, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", without_kernel)
    assert not make_optimizer(None, model()).param_groups[0]["fused"]


def test_an_optimizer_or_a_function_that_makes_one_is_taken():
    made = model()
    given = torch.optim.SGD(made.parameters(), lr=0.1)
    assert make_optimizer(given, made) is given
    made[0].requires_grad_(False)
    from_function = make_optimizer(lambda params: torch.optim.SGD(params, lr=0.2), made)
    assert len(from_function.param_groups[0]["params"]) == 4
    assert type(make_optimizer(torch.optim.AdamW, made)) is torch.optim.AdamW


class Closes(torch.optim.SGD):
    def step(self, closure):
        return closure()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adamw", "optimizer='adamw'.*Pass for example lambda params"),
        (3, "optimizer=3"),
        (lambda params: None, "a function for the optimizer that gave None.*Allowed: a torch.optim.Optimizer"),
        (lambda params: Closes(params, lr=0.1), "Closes, whose step needs a closure"),
        (torch.optim.SGD(model().parameters(), lr=0.1), "holds none of the model's trainable parameters.*very model"),
    ],
)
def test_other_optimizers_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(given, model())


def test_nothing_to_train_is_refused_before_the_function_is_called():
    with pytest.raises(ConfigError, match=r"a model without trainable parameters.*Unfreeze a layer"):
        make_optimizer(lambda params: 1 / 0, model().requires_grad_(False))


def test_state_made_before_a_plan_changed_the_memory_format_follows_its_parameter():
    conv = nn.Conv2d(2, 3, 3)
    optimizer = torch.optim.AdamW(conv.parameters())
    conv(torch.randn(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    before = optimizer.state[conv.weight]["exp_avg"].clone()
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    align_optimizer(optimizer)
    after = optimizer.state[conv.weight]["exp_avg"]
    assert after.stride() == conv.weight.stride() != before.stride()
    assert torch.equal(after, before)


# -- scheduler -----------------------------------------------------------------------------------------------------


def test_a_scheduler_or_a_function_that_makes_one_is_taken():
    optimizer = make_optimizer(None, model())
    given = StepLR(optimizer, 3)
    assert make_scheduler(None, optimizer) is None
    assert make_scheduler(given, optimizer) is given
    assert type(make_scheduler(ReduceLROnPlateau, optimizer)) is ReduceLROnPlateau
    assert type(make_scheduler(lambda o: LambdaLR(o, lambda step: 0.5), optimizer)) is LambdaLR


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cosine", "scheduler='cosine'.*Pass for example lambda opt"),
        (lambda optimizer: 3, "a function for the scheduler that gave 3"),
        (StepLR(torch.optim.SGD(model().parameters(), lr=0.1), 3), "a scheduler of another optimizer.*Pass optimizer="),
    ],
)
def test_other_schedulers_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make_scheduler(given, make_optimizer(None, model()))


# -- seed ---------------------------------------------------------------------------------------------------------


def drawn():
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_a_seed_fixes_python_numpy_and_torch():
    seed_everything(3)
    first = drawn()
    seed_everything(3)
    assert drawn() == first
    seed_everything(4)
    assert all(a != b for a, b in zip(drawn(), first, strict=True))


def test_no_seed_leaves_the_generators_alone():
    seed_everything(3)
    first = drawn()
    seed_everything(3)
    seed_everything(None)
    assert drawn() == first


def test_a_seed_beyond_numpys_range_is_taken():
    seed_everything(2**64 - 1)
    first = drawn()
    seed_everything(2**64 - 1)
    assert drawn() == first


@pytest.mark.parametrize(("smallest", "floor"), [(2.0**-24, 2.0**-14), (2.0**-14, 2.0**-4)])
def test_the_floor_of_the_scale_rises_where_the_device_flushes_subnormals(smallest, floor):
    device = SimpleNamespace(smallest_useful=lambda format: smallest)
    scaler = make_scaler(DynamicLossScale(), PrecisionPlan.of("fp16"), device, torch.device("cpu"))
    assert scaler.policy.floor == floor


def test_without_fp16_the_scale_is_one_whatever_the_policy():
    scaler = make_scaler(
        DynamicLossScale(), PrecisionPlan.of("bf16"), backends.capabilities("cpu"), torch.device("cpu")
    )
    assert scaler.get_scale() == 1.0
