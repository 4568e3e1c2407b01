"""The look at inputs in every step: what it sees, and when it speaks against a step."""

import torch
from torch import nn

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
    assert look.grown() == {"a": 20.0}
    assert look.grown() == {}


def test_inputs_within_their_limits_do_not():
    model, look = looking({"a": 10.0})
    model["a"](torch.full((4, 8), 9.0))
    model["b"](torch.full((4, 8), 99.0))  # not watched
    assert float(look.veto()) == 0.0
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
    monkeypatch.setattr(input_look, "_largest", lambda given: looks.append(given) or original(given))
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
    assert look.grown() == {"a": 3.0, "b": 3.0}
    assert look._last is None, "nothing is held on to"
