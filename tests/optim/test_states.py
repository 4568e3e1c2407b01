"""Moments in 8-bit blocks: everything that the optimizers promise, with them."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from whole_state import everything, same, skip_a_step

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.block_states import decode
from deepseek_mp.optim import SGD, AdamW, footprint, set_storage
from deepseek_mp.optim import states as states_module
from deepseek_mp.optim.states import blocks_of, moment_rows
from deepseek_mp.precision.storage import StorageFormat

MAKERS = {
    "adamw": lambda params, **options: AdamW(params, **{"lr": 1e-2, **options}),
    "sgd": lambda params, **options: SGD(params, **{"lr": 0.1, "momentum": 0.9, **options}),
}


@pytest.fixture
def net():
    def make(dtype=torch.float32):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 300), nn.Tanh(), nn.Linear(300, 33), nn.Tanh(), nn.Linear(33, 4)).to(dtype)

    return make


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


def test_large_matrices_have_bytes_and_the_rest_has_fp32(net, train):
    model = net()
    optimizer = AdamW(model.parameters(), states="8bit")
    train(model, optimizer, 1)
    kinds = [
        {value.dtype for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)}
        for p in model.parameters()
    ]
    assert kinds[0] == kinds[2] == {torch.int8, torch.uint8, torch.float32}
    assert all(kind == {torch.float32} for kind in kinds[1:2] + kinds[3:])


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
def test_it_trains_as_fp32_states_do(net, train, maker, storage):
    ends = []
    for states in ("fp32", "8bit"):
        model = net()
        optimizer = maker(model.parameters(), states=states)
        for parameter in model.parameters():
            set_storage(optimizer, parameter, storage)
        train(model, optimizer, 30)
        ends.append([p.detach().float() for p in model.parameters()])
    start = net()
    for a, b, first in zip(*ends, start.parameters(), strict=True):
        assert (a - b).norm() < 0.1 * (a - first).norm()


def test_pieces_are_as_the_whole(net, train, maker, monkeypatch):
    """Also of BF16 weights that are rounded by counted random bits."""
    ends = []
    for size in (1 << 20, 512):
        monkeypatch.setitem(states_module.PIECE, "cpu", size)
        model = net(torch.bfloat16)
        optimizer = maker(model.parameters(), states="8bit", storage="bf16_sr")
        train(model, optimizer, 5)
        ends.append(everything(model, optimizer))
    assert same(*ends)


def test_no_gradient_moves_a_parameter_without_moments(net, train):
    model = net()
    before = model[0].weight.detach().clone()
    train(model, SGD(model.parameters(), lr=0.1, states="8bit"), 1)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("storage", ["bf16_kahan", "bf16_sr"])
def test_resume_has_the_same_bits(net, train, maker, storage):
    """Through the bytes of a file, into a model built in FP32."""
    model = net()
    optimizer = maker(model.parameters(), states="8bit")
    set_storage(optimizer, model[0].weight, storage)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    kept = everything(model, optimizer)
    train(model, optimizer, 5, start=5)
    file.seek(0)
    weights, state = torch.load(file)
    resumed = net()
    again = maker(resumed.parameters(), states="8bit")
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    assert same(kept, everything(resumed, again))
    train(resumed, again, 5, start=5)
    assert same(everything(model, optimizer), everything(resumed, again))


@pytest.mark.parametrize(("old", "new"), [("fp32", "8bit"), ("8bit", "fp32")])
def test_states_of_the_other_form_are_converted(net, train, maker, old, new):
    model = net()
    optimizer = maker(model.parameters(), states=old)
    train(model, optimizer, 5)
    other = net()
    other.load_state_dict(model.state_dict())
    converted = maker(other.parameters(), states=new)
    converted.load_state_dict(optimizer.state_dict())
    assert converted.param_groups[0]["states"] == new
    train(model, optimizer, 3, start=5)
    train(other, converted, 3, start=5)
    assert (new == "8bit") == any(key.endswith("_codes") for key in converted.state[other[0].weight])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.005)


def test_states_saved_without_the_option_are_converted(net, train):
    """Those of PyTorch's own optimizer, for one."""
    model = net()
    theirs = torch.optim.AdamW(model.parameters())
    train(model, theirs, 2)
    optimizer = AdamW(model.parameters(), states="8bit")
    optimizer.load_state_dict(theirs.state_dict())
    expected = theirs.state[model[0].weight]["exp_avg"].flatten()
    model[0].weight.grad = None
    optimizer.step()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    found = decode(blocks_of(optimizer.state[model[0].weight], "exp_avg"))
    assert (found - 0.9 * expected).abs().max() < 0.03 * expected.abs().max()


def test_a_group_may_keep_fp32(net, train):
    model = net()
    groups = [{"params": model[0].parameters(), "states": "fp32"}, {"params": model[2].parameters()}]
    optimizer = AdamW(groups, states="8bit")
    train(model, optimizer, 1)
    assert "exp_avg" in optimizer.state[model[0].weight]
    assert "exp_avg_codes" in optimizer.state[model[2].weight]


def test_a_copy_trains_on(net, train, maker):
    model = net(torch.bfloat16)
    optimizer = maker(model.parameters(), states="8bit", storage="bf16_sr")
    train(model, optimizer, 3)
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, start=3)
    train(other, copied, 3, start=3)
    assert same(everything(model, optimizer), everything(other, copied))


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan", "bf16_sr"])
def test_a_step_skipped_by_the_device_leaves_everything(net, train, maker, storage):
    model = net()
    optimizer = maker(model.parameters(), states="8bit")
    for parameter in model.parameters():
        set_storage(optimizer, parameter, storage)
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    skip_a_step(model, optimizer)
    assert same(before, everything(model, optimizer))
    del optimizer.grad_scale, optimizer.found_inf
    train(model, optimizer, 1)
    assert not same(before, everything(model, optimizer))


def test_a_skipped_step_leaves_the_codes_of_a_spoilt_block(net, train, maker):
    """The only ones that opening and closing would surely change."""
    model = net()
    optimizer = maker(model.parameters(), states="8bit")
    train(model, optimizer, 2)
    state = optimizer.state[model[0].weight]
    codes, scales = next((v, state[k.replace("codes", "scales")]) for k, v in state.items() if k.endswith("_codes"))
    scales[0] = torch.nan
    before = codes.clone()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(codes, before)


def test_steps_that_the_device_may_skip_come_to_the_same(net, train, maker):
    models = net(), net()
    for model, skippable in zip(models, (False, True), strict=True):
        optimizer = maker(model.parameters(), states="8bit")
        if skippable:
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        train(model, optimizer, 5)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # A moment that differs in its last bit may be rounded to another code.
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_schedule_and_a_rate_that_is_a_tensor(net, train):
    ends = []
    for rate in (1e-2, torch.tensor(1e-2)):
        model = net()
        optimizer = AdamW(model.parameters(), lr=rate, states="8bit")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        train(model, optimizer, 10, scheduler=schedule)
        ends.append(list(model.parameters()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_memory_formats_and_strided_gradients(train):
    """A weight in channels_last is one piece, in the order of its elements."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(32, 16, 3, 3).to(memory_format=layout))
        optimizer = AdamW([weight], lr=1e-2, states="8bit")
        for step in range(3):
            torch.manual_seed(step)
            weight.grad = torch.randn(32, 16, 3, 3).to(memory_format=layout)
            optimizer.step()
        ends.append((weight.detach(), optimizer.state[weight]["exp_avg_sq_codes"]))
    torch.testing.assert_close(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 7), (13, 40), (290, 400)])
def test_rows_of_a_moment(net, train, start, stop):
    model = net()
    optimizer = AdamW(model.parameters(), states="8bit")
    train(model, optimizer, 2)
    weight = model[2].weight
    state = optimizer.state[weight]
    whole = decode(blocks_of(state, "exp_avg")).view(weight.shape)
    assert torch.equal(moment_rows(state, "exp_avg", weight, start, stop), whole[start:stop])
    bias = model[2].bias
    assert torch.equal(moment_rows(optimizer.state[bias], "exp_avg", bias), optimizer.state[bias]["exp_avg"])
    assert moment_rows(optimizer.state[bias], "momentum", bias) is None


def test_watched_updates_are_measured(net, train):
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-6, states="8bit")
    optimizer.watch([model[0].weight])
    train(model, optimizer, 1)
    assert optimizer.fates[model[0].weight][0] > 0.9


def test_bytes_for_each_value():
    size = 64 * 1024
    found = {}
    for format in StorageFormat:
        weight = nn.Parameter(torch.randn(64, 1024))
        optimizer = AdamW([weight], states="8bit")
        set_storage(optimizer, weight, format)
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
        optimizer.step()
        optimizer.zero_grad()
        found[format.value] = footprint(optimizer)[format].total - 4
    scales = 2 * 4 * size // 256
    assert found == {"fp32": 6 * size + scales, "bf16_kahan": 6 * size + scales, "bf16_sr": 4 * size + scales}


def test_refuses_an_unknown_format(net):
    with pytest.raises(ConfigError, match=r"unknown format of states '4bit'.*fp32.*8bit"):
        AdamW(net().parameters(), states="4bit")


class Largest(TorchDispatchMode):
    """Notes the largest FP32 tensor that any operation makes, but for views of those given."""

    def __init__(self, *known):
        super().__init__()
        self.elements = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype is torch.float32:
            own = made.untyped_storage().data_ptr() not in self.known
            self.elements = max(self.elements, made.numel() * own)
        return made


@pytest.mark.parametrize("storage", ["fp32", "bf16_sr"])
def test_no_more_than_a_piece_is_ever_in_fp32(monkeypatch, maker, storage):
    monkeypatch.setitem(states_module.PIECE, "cpu", 1024)
    weight = nn.Parameter(torch.randn(64, 256))
    optimizer = maker([weight], states="8bit")
    set_storage(optimizer, weight, storage)
    for _ in range(2):
        weight.grad = torch.randn(weight.shape)
        with Largest(weight, weight.grad) as largest:
            optimizer.step()
        assert 0 < largest.elements <= 1024
