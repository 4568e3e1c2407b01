"""Parameters, groups and models that cannot be offloaded are refused."""

import pytest
import torch
from fake_device import small_model
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.optim.offload.trained import as_groups, check_model, members_of


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "no parameters"),
        ([nn.Parameter(torch.zeros(2, dtype=torch.float64))], "torch.float64"),
        ([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))], "one device"),
    ],
)
def test_refuses_parameters(params, message):
    with pytest.raises(ConfigError, match=message):
        OffloadedOptimizer(params)


def test_refuses_what_is_there_twice_or_has_a_name():
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="there twice"):
        OffloadedOptimizer([parameter, parameter])
    with pytest.raises(ConfigError, match="without names"):
        OffloadedOptimizer(small_model().named_parameters())


def test_refuses_a_model_of_several_processes(monkeypatch):
    class Parallel(nn.Module):
        pass

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Parallel)
    model = Parallel()
    model.inner = small_model()
    with pytest.raises(ConfigError, match="averaged after"):
        OffloadedOptimizer(model.parameters(), model=model)


def test_a_model_that_would_not_wait_for_all_parameters_is_refused():
    model = small_model()
    with pytest.raises(ConfigError, match=r"without 8 of the 8 parameters.*Pass the whole model"):
        OffloadedOptimizer(model.parameters(), model=small_model())
    with pytest.raises(ConfigError, match="without 2 of the 8 parameters"):
        OffloadedOptimizer(model.parameters(), model=model[:4])
    check_model(model, [model[0].weight])


def test_groups_have_lists_of_their_own():
    weight, bias = small_model()[0].parameters()
    groups = as_groups([{"params": iter([weight]), "lr": 0.1}, {"params": bias}])
    assert [group["params"] for group in groups] == [[weight], [bias]]
    assert [(member.parameter, member.group) for member in members_of(groups)] == [(weight, 0), (bias, 1)]
    assert [len(group["params"]) for group in as_groups(iter([weight, bias]))] == [2]
