"""A state that does not fit is refused before anything changes, and groups of other rules are."""

import copy

import pytest
import torch
from fake_device import backward, offloaded, same, small_model, weights

from deepseek_mp.errors import ConfigError, MixedPrecisionError
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.optim.offload.loaded_state import MASTER, check_entries, check_rule


def trained(dtype=torch.float32):
    model = small_model(dtype)
    optimizer = offloaded(model)
    backward(model)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", MASTER])
@pytest.mark.parametrize("shape", [(1,), (2, 2), ()])
def test_tensors_of_other_shapes_are_refused_and_nothing_changes(key, shape):
    model, optimizer = trained(torch.bfloat16)
    saved = copy.deepcopy(optimizer.state_dict())
    backward(model)
    optimizer.step()
    states = copy.deepcopy(optimizer.state_dict()["state"])
    before = weights(model)
    saved["state"][5][key] = torch.zeros(shape)
    with pytest.raises(ConfigError, match=rf"whose {key} is .*Allowed: \[17\].*same model"):
        optimizer.load_state_dict(saved)
    assert same(before, weights(model))
    for number, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states[number][name]) for name, value in entries.items())
    backward(model)
    optimizer.step()
    assert optimizer.report.applied


def test_a_state_of_another_optimizer_is_refused():
    _, optimizer = trained()
    other = small_model()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    backward(other)
    sgd.step()
    before = optimizer.param_groups[0]["lr"]
    with pytest.raises(ConfigError, match=r"without step and exp_avg and exp_avg_sq.*Load the state of an AdamW"):
        optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["lr"] == before
    adam = torch.optim.Adam(other.parameters(), weight_decay=0.1)
    with pytest.raises(ConfigError, match=r"a state of Adam, whose weight decay is part of the gradient"):
        optimizer.load_state_dict(adam.state_dict())


def test_states_put_in_by_others_are_refused_and_no_step_is_made_on_them():
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state[optimizer.master(model[2].bias)]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"exp_avg is \[3\]"):
        optimizer.adopt_states()
    backward(model)
    with pytest.raises(MixedPrecisionError, match="failed halfway"):
        optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.report.applied


def test_a_counter_may_be_a_number_as_in_old_states():
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for entries in saved["state"].values():
        entries["step"] = 7
    optimizer.load_state_dict(saved)
    backward(model)
    optimizer.step()
    assert all(float(entries["step"]) == 8 for entries in optimizer.state.values())


def test_entries_may_be_missing_or_the_master_alone():
    check_entries({}, torch.zeros(3))
    check_entries({MASTER: torch.zeros(3)}, torch.zeros(3))


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_groups_of_other_rules_are_refused(option):
    with pytest.raises(ConfigError, match=f"a group with {option}"):
        check_rule([{}, {option: True}], "a group")
    with pytest.raises(ConfigError, match=f"a group with {option}"):
        OffloadedOptimizer([{"params": small_model().parameters(), option: True}])
