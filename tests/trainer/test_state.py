"""A trainer's state by name: what is saved, what is checked, and that it comes back exactly."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from deepseek_mp.errors import CheckpointError
from deepseek_mp.optim import AdamW
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.trainer import state
from deepseek_mp.trainer.state_file import decode_state, encode_state


class Net(nn.Module):
    """A convolution, a tied pair, a scalar parameter, and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, x):
        hidden = self.conv(x).mean(dim=(2, 3))
        return self.two(self.one(hidden)) * self.scale


def trained(optimizer=torch.optim.AdamW, steps=2, **options):
    """A model and an optimizer with a state."""
    model = Net()
    made = optimizer(model.parameters(), lr=0.1, **options)
    for step in range(steps):
        model(torch.full((2, 2, 4, 4), 1.0 + step)).square().sum().backward()
        made.step()
        made.zero_grad()
    return model, made


# -- the model ------------------------------------------------------------------------------------------


def test_the_model_is_its_state_dict_and_the_rest_are_transient():
    model = Net()
    assert set(state.model_tensors(model)) == {
        "conv.weight", "conv.bias", "one.weight", "two.weight", "scale", "kept"
    }  # fmt: skip
    assert set(state.transient_buffers(model)) == {"passing"}


def test_extra_state_that_is_no_tensor_is_left_out():
    class WithExtra(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, value):
            raise AssertionError("not stored")

    assert set(state.model_tensors(WithExtra(2, 2))) == {"weight", "bias"}


def test_loading_copies_into_the_models_own_tensors():
    source, target = Net(), Net()
    with torch.no_grad():
        for tensor in [*source.parameters(), *source.buffers()]:
            tensor.add_(1.0)
    target.conv.weight.data = target.conv.weight.data.contiguous(memory_format=torch.channels_last)
    objects = [id(t) for t in [*target.parameters(), *target.buffers()]]
    strides = target.conv.weight.stride()
    saved = {name: t.clone() for name, t in state.model_tensors(source).items()}
    state.load_model(target, saved, {"passing": source.passing.clone()})
    assert all(torch.equal(t, saved[name]) for name, t in target.state_dict().items())
    assert torch.equal(target.passing, source.passing)
    assert [id(t) for t in [*target.parameters(), *target.buffers()]] == objects
    assert target.two.weight is target.one.weight
    assert target.conv.weight.stride() == strides


def test_a_transient_buffer_of_another_shape_is_left_alone():
    model = Net()
    state.load_model(model, state.model_tensors(Net()), {"passing": torch.ones(5)})
    assert torch.equal(model.passing, torch.zeros(2))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"a": torch.zeros(2)}, r"tensors \[\], but the one here has \['b'\]"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)},
            r"tensors \['c'\], but the one here has \[\]",
        ),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, r"with a \(3,\) torch.float32, but the one here has \(2,\)"),
        ({"a": torch.zeros(2).half(), "b": torch.zeros(1)}, r"with a \(2,\) torch.float16, .*torch.float32"),
    ],
)
def test_other_names_shapes_and_dtypes_are_refused(saved, message):
    here = {"a": torch.zeros(2), "b": torch.zeros(1)}
    state.check_tensors(here, dict(here))
    with pytest.raises(CheckpointError, match=f"{message}.*Build the run as it was"):
        state.check_tensors(here, saved)


# -- the optimizer ----------------------------------------------------------------------------------------


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "capturable": (torch.optim.NAdam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "no state": (torch.optim.SGD, {}),
    "rprop": (torch.optim.Rprop, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "means of rows": (torch.optim.Adafactor, {}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_continues_exactly_as_it_would_have(kind):
    make, options = OPTIMIZERS[kind]
    model, optimizer = trained(make, **options)
    tensors, values = state.optimizer_state(model, optimizer)
    values = decode_state(encode_state(values))
    tensors = {name: t.clone() for name, t in tensors.items()}
    other, fresh = trained(make, steps=0, **options)
    fresh.param_groups[0]["lr"] = 7.0
    state.load_model(other, {name: t.clone() for name, t in state.model_tensors(model).items()}, {})
    state.check_optimizer(other, fresh, values)
    state.load_optimizer(other, fresh, tensors, values)
    assert fresh.param_groups[0]["lr"] == 0.1
    if "betas" in fresh.param_groups[0]:
        assert type(fresh.param_groups[0]["betas"]) is tuple
    for one, two in ((model, optimizer), (other, fresh)):
        one(torch.ones(2, 2, 4, 4)).square().sum().backward()
        two.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == fresh.state[b].keys()


def test_entries_carry_the_names_of_their_parameters():
    model, optimizer = trained()
    tensors, values = state.optimizer_state(model, optimizer)
    assert {name.rsplit("/")[0] for name in tensors} == {"conv.weight", "conv.bias", "one.weight", "scale"}
    assert values["groups"][0]["params"] == ["scale", "conv.weight", "conv.bias", "one.weight"]
    assert values["type"] == "AdamW"


def test_the_order_of_parameters_does_not_matter():
    model, optimizer = trained()
    tensors, values = state.optimizer_state(model, optimizer)
    other = Net()
    backwards = torch.optim.AdamW(list(other.parameters())[::-1], lr=0.1)
    state.check_optimizer(other, backwards, values)
    state.load_optimizer(other, backwards, tensors, values)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], backwards.state[b]["exp_avg"]), name


def test_a_state_keeps_its_dtype_and_takes_its_parameters_memory_format():
    model, optimizer = trained()
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].double()
    tensors, values = state.optimizer_state(model, optimizer)
    other = Net()
    other.conv.weight.data = other.conv.weight.data.contiguous(memory_format=torch.channels_last)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    state.load_optimizer(other, fresh, tensors, values)
    loaded = fresh.state[other.conv.weight]["exp_avg"]
    assert loaded.dtype == torch.float64
    assert loaded.stride() == other.conv.weight.stride()
    assert torch.equal(loaded, tensors["conv.weight/exp_avg"])
    assert loaded is not tensors["conv.weight/exp_avg"]


@pytest.mark.parametrize(("fused", "counter"), [(False, "cpu"), (True, "meta")])
def test_step_counters_stay_on_the_host_and_the_state_of_a_scalar_parameter_does_not(fused, counter):
    """The meta device stands for an accelerator here: it is not the CPU."""
    model, optimizer = trained()
    tensors, values = state.optimizer_state(model, optimizer)
    for group in values["groups"]:
        group["options"]["fused"] = fused
    other = Net().to("meta")
    other.two.weight = other.one.weight  # moving there breaks the tie
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    state.load_optimizer(other, fresh, tensors, values)
    for param in other.parameters():
        entry = fresh.state[param]
        assert entry["step"].device.type == counter
        assert entry["exp_avg"].device.type == entry["exp_avg_sq"].device.type == "meta"


def test_a_learning_rate_in_a_tensor_stays_one():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))
    tensors, values = state.optimizer_state(model, optimizer)
    rate = torch.tensor(0.5)
    other = torch.optim.AdamW(Net().parameters(), lr=rate)
    state.load_optimizer(model, torch.optim.AdamW(model.parameters(), lr=rate), tensors, values)
    assert rate.item() == 0.25
    assert other.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
@pytest.mark.parametrize("kind", [AdamW, OffloadedOptimizer])
def test_options_that_the_optimizer_here_would_pass_over_are_refused(kind, option):
    model, optimizer = trained(**{option: True})
    _, values = state.optimizer_state(model, optimizer)
    state.check_optimizer(model, torch.optim.AdamW(model.parameters()), values)
    with pytest.raises(CheckpointError, match=option):
        state.check_optimizer(model, kind(model.parameters(), lr=0.1), values)


def test_another_kind_of_optimizer_is_refused():
    model, optimizer = trained()
    _, values = state.optimizer_state(model, optimizer)
    with pytest.raises(CheckpointError, match="optimizer AdamW, but the one here has SGD"):
        state.check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), values)


def test_other_groups_are_refused_by_the_names_that_differ():
    model, optimizer = trained()
    _, values = state.optimizer_state(model, optimizer)
    params = list(model.parameters())
    split = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    message = r"groups \['conv\.bias', .*\] in group 0, but the one here has \['scale'\]"
    with pytest.raises(CheckpointError, match=message):
        state.check_optimizer(model, split, values)
    fewer = torch.optim.AdamW(params[1:])
    with pytest.raises(CheckpointError, match=r"'scale'\] in group 0, but"):
        state.check_optimizer(model, fewer, values)
    more = torch.optim.AdamW([{"params": params}, {"params": [nn.Parameter(torch.ones(1))]}])
    with pytest.raises(CheckpointError, match=r"\[\] in group 1, but the one here has \['optimizer\.1\.0'\]"):
        state.check_optimizer(model, more, values)


def test_parameters_outside_the_model_are_found_by_position():
    model, extra = Net(), nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [extra]}], lr=0.1)
    outside = state.outside_parameters(model, optimizer)
    assert list(outside) == ["optimizer.1.0"]
    state.load_tensors(outside, {"optimizer.1.0": torch.tensor([5.0])})
    assert extra.item() == 5.0
    assert state.outside_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1)) == {}


# -- gradients and values ------------------------------------------------------------------------------------


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_gradients_come_back_and_those_not_saved_go():
    model = Net()
    model(torch.ones(2, 2, 4, 4)).sum().backward()
    model.scale.grad = None
    saved = {name: g.clone() for name, g in state.gradients(model, sgd(model)).items()}
    assert set(saved) == {"conv.weight", "conv.bias", "one.weight"}
    other = Net()
    other.scale.grad = torch.tensor(3.0)
    state.load_gradients(other, sgd(other), saved)
    assert other.scale.grad is None
    assert all(torch.equal(g, saved[name]) for name, g in state.gradients(other, sgd(other)).items())


def test_tensors_leave_nested_values_and_return():
    value = {
        "a": torch.ones(2),
        "b": [1, {"c": (torch.zeros(1), "text")}],
        "d": Counter({3: 1}),
        "e": {"$tensor": torch.tensor(5)},
        4: None,
    }
    tensors = {}
    plain = state.split_tensors(value, tensors)
    assert len(tensors) == 3
    back = state.join_tensors(decode_state(encode_state(plain)), tensors)
    assert torch.equal(back["a"], value["a"])
    assert type(back["b"][1]["c"]) is tuple
    assert torch.equal(back["b"][1]["c"][0], torch.zeros(1))
    assert back["d"] == Counter({3: 1})
    assert type(back["d"]) is Counter
    assert back["e"]["$tensor"].item() == 5
    assert back[4] is None
    assert value["a"] is not plain["a"]
