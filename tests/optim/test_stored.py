import copy
import io
import pickle

import pytest
import torch
from torch import nn
from whole_state import everything, same, skip_a_step

from deepseek_mp.controller import LossScaler
from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.optim import SGD, Adafactor, AdamW, set_storage
from deepseek_mp.optim.stored import SMALL, gated
from deepseek_mp.precision.storage import StorageFormat

BF16 = [format.value for format in StorageFormat if format.is_bf16]


@pytest.mark.parametrize("storage", BF16)
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_bf16_parameters_follow_fp32_ones(net, train, storage, kind):
    """Small steps that rounding to nearest would lose all of."""
    exact, stored = net(), net(torch.bfloat16)
    exact.load_state_dict(stored.state_dict())
    options = {"lr": 2e-5} if kind is AdamW else {"lr": 1e-4, "momentum": 0.9}
    train(exact, kind(exact.parameters(), **options), 60)
    train(stored, kind(stored.parameters(), storage=storage, **options), 60)
    start = net(torch.bfloat16)
    for a, b, first in zip(exact.parameters(), stored.parameters(), start.parameters(), strict=True):
        moved, followed = a - first.float(), b.float() - first.float()
        projection = ((moved * followed).sum() / moved.square().sum()).item()
        assert projection == pytest.approx(1, abs=0.5 if b.numel() < 100 else 0.2), b.shape


@pytest.mark.parametrize("storage", BF16)
def test_one_by_one_is_as_all_together(net, train, storage):
    models = net(torch.bfloat16), net(torch.bfloat16)
    for model, foreach in zip(models, (False, True), strict=True):
        train(model, AdamW(model.parameters(), storage=storage, foreach=foreach))
    assert same(list(models[0].parameters()), list(models[1].parameters()))


def test_the_seed_decides_how_values_are_rounded(net, train):
    ends = []
    for seed in (0, 0, 1):
        model = net(torch.bfloat16)
        train(model, AdamW(model.parameters(), storage="bf16_sr", seed=seed))
        ends.append(list(model.parameters()))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_resume_has_the_same_bits(net, train):
    """Of mixed storages, through the bytes of a file, into a model built in FP32."""

    def build():
        model = net()
        return model, AdamW(model.parameters(), lr=1e-2, seed=3)

    model, optimizer = build()
    set_storage(optimizer, model[0].weight, "bf16_sr")
    set_storage(optimizer, model[2].weight, "bf16_kahan")
    train(model, optimizer, 7)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 7, start=7)
    file.seek(0)
    weights, state = torch.load(file)
    resumed, again = build()
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(resumed, again, 7, start=7)
    assert [again.storage(p).value for p in resumed.parameters()] == ["bf16_sr", "fp32", "bf16_kahan", "fp32"]
    assert same(everything(model, optimizer), everything(resumed, again))


@pytest.mark.parametrize("of", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_a_copy_of_model_and_optimizer_trains_on(net, train, of):
    model = net(torch.bfloat16)
    optimizer = AdamW(model.parameters(), storage="bf16_sr")
    train(model, optimizer, 3)
    other, copied = of((model, optimizer))
    assert [copied.storage(p) for p in other.parameters()] == [StorageFormat.BF16_SR] * 4
    assert [p.grad_dtype for p in other.parameters()] == [torch.float32] * 4
    train(model, optimizer, 3, start=3)
    train(other, copied, 3, start=3)
    assert same(everything(model, optimizer), everything(other, copied))


@pytest.mark.parametrize("storage", BF16)
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_step_skipped_by_the_device_leaves_everything(net, train, storage, kind):
    model = net(torch.bfloat16)
    options = {} if kind is AdamW else {"momentum": 0.9}
    optimizer = kind(model.parameters(), lr=1e-2, storage=storage, **options)
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    skip_a_step(model, optimizer)
    assert same(before, everything(model, optimizer))
    del optimizer.grad_scale, optimizer.found_inf
    train(model, optimizer, 1)
    assert not same(before, everything(model, optimizer))


@pytest.mark.parametrize("storage", ["fp32", *BF16])
def test_the_first_step_may_be_skipped_by_the_device(net, storage):
    model = net(torch.bfloat16)
    optimizer = AdamW(model.parameters())
    for parameter in model.parameters():
        set_storage(optimizer, parameter, storage)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan, dtype=torch.float32)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for parameter, start in zip(model.parameters(), net(torch.bfloat16).parameters(), strict=True):
        assert torch.equal(parameter, start.to(parameter.dtype))


@pytest.mark.parametrize("scaler", [LossScaler(1024.0), torch.amp.GradScaler("cpu", init_scale=1024.0)])
def test_scaled_gradients_give_the_step_of_unscaled_ones(net, train, scaler):
    plain, scaled = net(torch.bfloat16), net(torch.bfloat16)
    train(plain, AdamW(plain.parameters()), 1)
    optimizer = AdamW(scaled.parameters())
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (scaled(x).float() - x[:, :4]).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_bf16_parameters_add_up_in_fp32(net):
    model = net(torch.bfloat16)
    AdamW(model.parameters())
    for _ in range(300):
        model(torch.ones(1, 16, dtype=torch.bfloat16)).sum().backward()
    assert model[2].bias.grad.dtype is torch.float32
    assert model[2].bias.grad.eq(300).all()  # BF16 counts to 256


def test_a_closure_is_called_with_gradients(net):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)

    def closure():
        loss = model(torch.ones(1, 16)).sum()
        loss.backward()
        return loss

    before = model[0].weight.clone()
    assert optimizer.step(closure).requires_grad
    assert not torch.equal(before, model[0].weight)


def test_watched_updates_are_measured_once(net, train):
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-6)
    optimizer.watch([model[0].weight])
    train(model, optimizer, 1)
    fate = optimizer.fates.pop(model[0].weight)
    assert fate[0] > 0.9  # lost by rounding to nearest
    train(model, optimizer, 1)
    assert not optimizer.fates


def test_refuses_parameters_it_cannot_keep():
    with pytest.raises(ConfigError, match=r"a parameter \[2\] of torch.float16"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.float16))])


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (AdamW, {"betas": (2.0, 1.0)}, "betas"),
        (AdamW, {"lr": -1.0}, "lr=-1.0"),
        (SGD, {"momentum": -0.1}, "momentum=-0.1"),
        (SGD, {"nesterov": True}, "nesterov=True with momentum=0.0"),
        (Adafactor, {"d": 0.1}, "d=0.1"),
        (Adafactor, {"states": "8bit"}, "states='8bit' for Adafactor"),
        (AdamW, {"amsgrad": True}, "a group with amsgrad"),
        (SGD, {"maximize": True}, "a group with maximize"),
        (Adafactor, {"maximize": True}, "a group with maximize"),
    ],
)
def test_refuses_options_of_a_group_that_are_out_of_range(kind, options, match):
    group = {"params": [nn.Parameter(torch.ones(2))], **options}
    with pytest.raises(ConfigError, match=match):
        kind([dict(group)])
    optimizer = kind([nn.Parameter(torch.ones(2))])
    with pytest.raises(ConfigError, match=match):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_a_group_whose_options_have_another_form_is_not_added():
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="not iterable"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "betas": 0.9})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("theirs", "ours", "option"),
    [(torch.optim.AdamW, AdamW, "amsgrad"), (torch.optim.AdamW, AdamW, "maximize"), (torch.optim.SGD, SGD, "maximize")],
)
def test_refuses_a_state_of_pytorchs_with_another_rule(theirs, ours, option):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = ours([parameter], lr=0.1)
    with pytest.raises(ConfigError, match=f"a state with {option}"):
        optimizer.load_state_dict(theirs([parameter], lr=0.5, **{option: True}).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.load_state_dict(theirs([parameter], lr=0.5).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_refuses_sparse_gradients():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="dense gradients"):
        AdamW(embedding.parameters()).step()


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_gradients_of_a_skipped_step_are_zeros_small_or_large_and_as_they_lie_in_memory(keep):
    small, wide = torch.randn(3, 5), torch.randn(7, dtype=torch.float64)
    turned = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    large = torch.randn(SMALL + 1)
    grads = [small, large, wide, turned, torch.full((2,), torch.nan), torch.zeros(0)]
    found = gated(grads, torch.tensor(keep))
    for grad, now in zip(grads, found, strict=True):
        expected = grad if keep else torch.zeros_like(grad)
        torch.testing.assert_close(now, expected, rtol=0, atol=0, equal_nan=True)
        assert now.dtype is grad.dtype
        assert now.stride() == grad.stride()


@pytest.mark.parametrize("storage", BF16)
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_a_model_that_is_cast_later_is_stored_as_its_group_says(storage, states):
    weight = nn.Parameter(torch.randn(64, 128))
    optimizer = AdamW([weight], storage=storage, states=states)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        weight.grad = None
        weight.data = weight.data.to(dtype)
        weight.grad_dtype = torch.float32
        weight.grad = torch.randn(64, 128)
        optimizer.step()
        bf16 = dtype is torch.bfloat16
        assert optimizer.storage(weight).value == (storage if bf16 else "fp32")
        state = optimizer.state[weight]
        assert state.get("storage") == (storage if bf16 else None)
        assert ("compensation" in state) == (bf16 and storage == "bf16_kahan")


def made(kind=AdamW, shape=(128, 64), **options):
    weight = nn.Parameter(torch.randn(shape))
    optimizer = kind([weight], **options)
    weight.grad = torch.randn(shape)
    optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("shape", [(63, 64), (64, 128), (256, 64)])
def test_moments_of_a_parameter_that_was_smaller_or_larger_are_an_error(states, shape):
    """Kernels are given addresses: they would read and write beyond."""
    weight, optimizer = made(shape=(65, 64), states=states)
    weight.grad = None
    weight.data = torch.randn(shape)
    weight.grad = torch.randn(shape)
    with pytest.raises(ShapeError, match=rf"moments of 4160 values on cpu for a parameter \[{shape[0]}, {shape[1]}\]"):
        optimizer.step()


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_moments_that_stayed_where_a_model_was_are_an_error(states):
    weight, optimizer = made(states=states)
    state = optimizer.state[weight]
    state.update({name: value.to("meta") for name, value in state.items() if name != "step"})
    with pytest.raises(ShapeError, match=r"moments of 8192 values on meta for a parameter \[128, 64\] on cpu"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (256, 64)])
def test_a_gradient_of_another_shape_is_an_error(shape):
    weight, optimizer = made()
    weight.data = torch.randn(shape)
    with pytest.raises(ShapeError, match=rf"a gradient \[128, 64\] on cpu for a parameter \[{shape[0]}, {shape[1]}\]"):
        optimizer.step()


def test_moments_that_were_saved_in_16_bits_become_fp32():
    weight, optimizer = made()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].bfloat16()
    optimizer.load_state_dict(saved)
    expected = saved["state"][0]["exp_avg"].float().lerp(weight.grad, 0.1)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], expected)


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_momentum_that_is_set_later_begins_then(states):
    weight, optimizer = made(SGD, states=states, lr=0.1)
    optimizer.param_groups[0]["momentum"] = 0.9
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1 * weight.grad)
    assert any(key.startswith("momentum_buffer") for key in optimizer.state[weight])


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_step_is_the_same_whatever_the_default_device_is(kind):
    weight, optimizer = made(kind)
    other = copy.deepcopy(optimizer)
    (twin,) = other.param_groups[0]["params"]
    twin.grad = weight.grad
    optimizer.step()
    with torch.device("meta"):
        other.step()
    assert torch.equal(twin, weight)


def test_sharded_parameters_have_no_moments_in_blocks():
    class Sharded(nn.Parameter):
        """As `torch.distributed.tensor.DTensor`, which needs processes."""

    Sharded.__module__ = "torch.distributed.tensor"
    weight = Sharded(torch.zeros(64, 64))
    AdamW([weight])
    with pytest.raises(ConfigError, match=r"states='8bit' for a sharded parameter \[64, 64\]"):
        AdamW([weight], states="8bit")
