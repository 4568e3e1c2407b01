"""`DevicePart`: FP32 masters on the device, which an FP32 parameter is itself."""

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload.device_part import DevicePart
from deepseek_mp.optim.offload.host_chunk import Member
from deepseek_mp.optim.offload.verdict import AS_IT_IS, Scaling

GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def part_of(parameter):
    part = DevicePart([Member(parameter=parameter, group=0)])
    return part, part.pairs[0]


def test_fp32_is_its_own_master():
    parameter = nn.Parameter(torch.ones(3))
    part, pair = part_of(parameter)
    assert pair.master is parameter
    parameter.grad = torch.ones(3)
    with torch.no_grad():
        part.step([GROUP], {}, AS_IT_IS)
    assert torch.allclose(parameter, torch.full((3,), 0.9))


def test_bf16_is_rounded_from_its_master():
    parameter = nn.Parameter(torch.full((3,), 1.0, dtype=torch.bfloat16))
    part, pair = part_of(parameter)
    for _ in range(2):
        part.arrived(pair, torch.full((3,), 0.5, dtype=torch.bfloat16))
    assert torch.equal(pair.master.grad, torch.ones(3))
    states = {}
    with torch.no_grad():
        part.step([GROUP | {"lr": 1e-3}], states, Scaling(clip=0.5))
    assert torch.allclose(pair.master, torch.full((3,), 0.999))
    assert torch.equal(parameter, pair.master.bfloat16())
    assert not pair.written
    assert torch.allclose(states[pair.master]["exp_avg"], torch.full((3,), 0.05))


def test_a_parameter_that_was_moved_is_refused():
    parameter = nn.Parameter(torch.ones(3))
    part, _ = part_of(parameter)
    parameter.data = parameter.data.double()
    parameter.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"moved from cpu torch\.float32 to cpu torch\.float64"):
        part.step([GROUP], {}, AS_IT_IS)
