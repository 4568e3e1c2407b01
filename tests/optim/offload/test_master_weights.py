"""`Pair`: a master follows what is written into its parameter, and nothing else."""

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload.master_weights import Pair


def pair_of(dtype, master):
    parameter = nn.Parameter(master.to(dtype))
    pair = Pair(parameter, nn.Parameter(master.clone()), 0)
    pair.look()
    return pair


def test_only_changed_values_are_taken_over():
    master = torch.tensor([1.001, 2.001, 3.001])
    pair = pair_of(torch.bfloat16, master)
    assert not pair.written
    with torch.no_grad():
        pair.parameter[1] = 7.0
    assert pair.written
    pair.adopt()
    assert pair.master.tolist() == [master[0].item(), 7.0, master[2].item()]
    assert not pair.written


def test_values_are_compared_with_those_that_were_given():
    old, new = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5])
    pair = pair_of(torch.bfloat16, old)
    with torch.no_grad():
        pair.master.copy_(new)
        pair.parameter[0] = 9.0
    pair.adopt(base=old)
    assert pair.master.tolist() == [9.0, 2.5]


def test_new_memory_counts_as_written():
    pair = pair_of(torch.float32, torch.ones(2))
    pair.parameter.data = torch.zeros(2)
    pair.adopt()
    assert pair.master.tolist() == [0.0, 0.0]


def test_what_is_not_possible_is_refused():
    pair = pair_of(torch.float32, torch.ones(2, 2))
    with pytest.raises(ConfigError, match="sparse_coo"):
        pair.check_gradient(torch.ones(2, 2).to_sparse())
    pair.parameter.data = pair.parameter.data.bfloat16()
    with pytest.raises(ConfigError, match=r"moved from cpu torch\.float32 to cpu torch\.bfloat16"):
        pair.check_place()
