"""The look at inputs in every step: what it sees, and when it speaks against a step."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from deepseek_mp.nn.again import computed_again
from deepseek_mp.nn.lazy import lazy
from deepseek_mp.trainer import input_look
from deepseek_mp.trainer.input_look import InputLook


def looking(limits):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    look = InputLook()
    look.watch(model, limits)
    look.active = True
    return model, look


def test_an_input_above_its_limit_vetoes_the_step_and_is_named():
    model, look = looking({"a": 10.0, "b": 10.0})
    model["a"](torch.full((4, 8), -20.0))
    model["b"](torch.ones(4, 8))
    assert float(look.veto()) == 1.0
    look.settle()
    assert look.grown() == {"a": 20.0}
    assert look.grown() == {}


def test_inputs_within_their_limits_do_not():
    model, look = looking({"a": 10.0})
    model["a"](torch.full((4, 8), 9.0))
    model["b"](torch.full((4, 8), 99.0))  # not watched
    assert float(look.veto()) == 0.0
    look.settle()
    assert look.grown() == {}


def test_the_largest_of_several_calls_counts_and_a_step_starts_anew():
    model, look = looking({"a": 10.0})
    for size in (1.0, 20.0, 2.0):
        model["a"](torch.full((2, 3, 8), size))
    assert float(look.veto()) == 1.0
    model["a"](torch.ones(2, 8))
    assert float(look.veto()) == 0.0
    assert look.veto() is None


def test_an_outlier_channel_is_seen_in_a_part_of_the_rows():
    model, look = looking({"a": 10.0})
    x = torch.ones(1000, 8)
    x[:, 3] = 50.0
    model["a"](x)
    assert float(look.veto()) == 1.0


def test_probes_evaluations_and_empty_batches_are_not_looked_at():
    model, look = looking({"a": 10.0})
    look.active = False
    model["a"](torch.full((4, 8), 99.0))
    look.active = True
    model.eval()
    model["a"](torch.full((4, 8), 99.0))
    model.train()
    model["a"](torch.ones(0, 8))
    assert look.veto() is None


def test_a_forward_that_is_computed_again_is_not_looked_at():
    model, look = looking({"a": 10.0})
    with computed_again():
        model["a"](torch.full((4, 8), 20.0))
    assert look.veto() is None


def test_hooks_follow_what_is_watched_and_go():
    model, look = looking({"a": 10.0})
    look.watch(model, {"b": 5.0})
    assert (len(model["a"]._forward_pre_hooks), len(model["b"]._forward_pre_hooks)) == (0, 1)
    model["b"](torch.full((4, 8), 7.0))
    assert float(look.veto()) == 1.0
    look.watch(model, {"b": 50.0})
    model["b"](torch.full((4, 8), 7.0))
    assert float(look.veto()) == 0.0
    look.close()
    assert not model["b"]._forward_pre_hooks


def test_what_ran_before_a_step_does_not_count():
    model, look = looking({"a": 10.0})
    model["a"](torch.full((4, 8), 99.0))
    look.begin()
    model["a"](torch.ones(4, 8))
    assert float(look.veto()) == 0.0


def test_what_is_still_to_be_told_is_its_state():
    model, look = looking({"a": 10.0})
    model["a"](torch.full((4, 8), 99.0))
    look.veto()
    state = look.state_dict()
    assert state == {"a": 99.0}
    other = InputLook()
    other.load_state_dict(state)
    assert look.grown() == other.grown() == {"a": 99.0}
    assert look.state_dict() == {}


def test_an_input_that_several_layers_read_is_looked_at_once(monkeypatch):
    looks = []
    original = input_look._largest
    monkeypatch.setattr(input_look, "_largest", lambda *given: looks.append(given) or original(*given))
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    look = InputLook()
    look.watch(layers, {"a": 1.0, "b": 1.0})
    look.begin()
    x, y = torch.ones(8, 4), torch.full((8, 4), 3.0)
    for given in (x, y):
        for layer in layers.values():
            layer(given)
    assert len(looks) == 2
    assert float(look.veto()) == 1.0
    look.settle()
    assert look.grown() == {"a": 3.0, "b": 3.0}
    assert look._last is None, "nothing is held on to"


# -- a device that is behind -----------------------------------------------------------------------------


class Late(input_look.HostCopy):
    """A copy that has not arrived before somebody waits for it."""

    ready = False


def test_each_window_is_told_once_it_is_settled_however_far_behind_the_device_is(monkeypatch):
    monkeypatch.setattr(input_look, "HostCopy", Late)
    model, look = looking({"a": 10.0, "b": 10.0})
    for name, size in (("a", 20.0), ("b", 30.0), ("a", 1.0)):
        model[name](torch.full((4, 8), size))
        look.veto()
    assert look.grown() == {}, "no outcome has been read"
    told = []
    for _ in range(3):
        look.settle()
        told.append(look.grown())
    assert told == [{"a": 20.0}, {"b": 30.0}, {}]
    look.settle()  # a window that was closed before the look was there
    assert look.grown() == {}


def test_a_window_without_inputs_has_its_turn_as_well():
    model, look = looking({"a": 10.0})
    assert look.veto() is None
    model["a"](torch.full((4, 8), 20.0))
    look.veto()
    look.settle()
    assert look.grown() == {}
    look.settle()
    assert look.grown() == {"a": 20.0}


def test_a_window_is_judged_by_the_limits_it_was_closed_with():
    model, look = looking({"a": 10.0})
    model["a"](torch.full((4, 8), 20.0))
    look.veto()
    look.watch(model, {"a": 50.0})
    model["a"](torch.full((4, 8), 20.0))
    assert float(look.veto()) == 0.0
    look.settle()
    assert look.grown() == {"a": 20.0}
    look.settle()
    assert look.grown() == {}


def test_the_larger_of_two_windows_is_told():
    model, look = looking({"a": 10.0})
    for size in (30.0, 20.0):
        model["a"](torch.full((4, 8), size))
        look.veto()
        look.settle()
    assert look.grown() == {"a": 30.0}


def test_a_state_is_complete_and_windows_keep_their_turn_after_it(monkeypatch):
    monkeypatch.setattr(input_look, "HostCopy", Late)
    model, look = looking({"a": 10.0, "b": 10.0})
    model["a"](torch.full((4, 8), 20.0))
    look.veto()
    assert look.state_dict() == {"a": 20.0}
    model["b"](torch.full((4, 8), 30.0))
    look.veto()
    look.settle()
    assert look.grown() == {"a": 20.0}
    look.load_state_dict({})
    look.settle()
    assert look.grown() == {}, "windows before the state that is loaded do not count"


def test_a_closed_look_is_still_and_can_settle():
    model, look = looking({"a": 10.0})
    model["a"](torch.full((4, 8), 20.0))
    look.veto()
    model["a"](torch.full((4, 8), 20.0))
    look.close()
    assert (look.active, look._last, look._seen) == (False, None, {})
    assert look.veto() is None
    look.settle()
    assert look.grown() == {"a": 20.0}


# -- numbers that are not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_input_that_is_not_finite_is_left_to_another_guard(value):
    model, look = looking({"a": 10.0, "b": 10.0})
    x = torch.ones(4, 8)
    x[1, 2] = value
    model["a"](x)
    assert float(look.veto()) == 0.0
    model["a"](x)
    model["b"](torch.full((4, 8), 20.0))
    assert float(look.veto()) == 1.0, "the other one is finite"
    look.settle()
    look.settle()
    assert look.grown() == {"b": 20.0}


# -- which part of an input ------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channel", [3, 63])
def test_an_outlier_channel_of_a_convolution_is_seen(memory_format, channel):
    model = nn.ModuleDict({"a": nn.Conv2d(64, 4, 1)})
    look = InputLook()
    look.watch(model, {"a": 10.0})
    look.begin()
    x = torch.ones(8, 64, 20, 20)
    x[:, channel] = 50.0
    model["a"](x.to(memory_format=memory_format))
    assert float(look.veto()) == 1.0


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((4000, 8), 1), ((3, 5000, 8), 2), ((5000, 3, 8), 2), ((16, 32, 40, 40), 1), ((2, 8, 7, 999), 1), ((8, 900), 0)],
)
def test_some_positions_are_a_view_with_all_channels(shape, channels):
    given = torch.randn(shape)
    for x in (given, given.transpose(0, -1).contiguous().transpose(0, -1)):
        some = input_look._some_positions(x, channels)
        assert some.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "nothing is copied"
        assert some.shape[channels] == shape[channels]
        assert 100 <= some.numel() // shape[channels] <= 600


def test_a_few_positions_are_all_looked_at():
    for shape in ((7, 8), (2, 3, 8), (8,), (2, 3, 4, 8)):
        assert input_look._some_positions(torch.ones(shape), len(shape) - 1).shape == shape


def test_a_linear_layer_has_its_channels_last_however_many_dimensions_there_are():
    model, look = looking({"a": 10.0})
    x = torch.ones(4, 30, 30, 8)
    x[..., 5] = 50.0
    model["a"](x)
    assert float(look.veto()) == 1.0


def test_what_was_put_off_is_looked_at_and_stays_put_off():
    model, look = looking({"a": 10.0})
    values = torch.ones(4, 5, 8)
    values[..., 5] = 50.0
    x = torch.relu(lazy(values))
    assert x.promise.values is None
    look.see("a", model["a"], x)
    assert float(look.veto()) == 1.0
    look.see("a", nn.Conv1d(5, 2, 1), x)  # its channels are not what a row is made of
    assert float(look.veto()) == 1.0
    assert x.promise.values is None


# -- copies of the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_looked_at(copied):
    model, look = looking({"a": 10.0})
    other = copied(model)
    other["a"](torch.full((4, 8), 20.0))
    assert look.veto() is None
    model["a"](torch.full((4, 8), 20.0))
    assert float(look.veto()) == 1.0
