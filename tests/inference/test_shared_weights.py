"""Copies of a model share what they keep alike, and nothing else."""

import copy

import pytest
import torch
from torch import nn

from deepseek_mp.costs.memory import distinct_bytes
from deepseek_mp.inference import Form, Served
from deepseek_mp.inference.shared_weights import share_weights

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.Linear(256, 256), nn.Linear(256, 4))


def held(*models):
    return distinct_bytes([tensor for model in models for tensor in (*model.parameters(), *model.buffers())])


def test_all_that_is_alike_is_there_once(model):
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    owner, x = two[0].weight, torch.randn(3, 256)
    expected = two.eval()(x)
    assert share_weights([model, one, two]) == [False, True, True]
    assert held(model, one, two) == held(model)
    assert two[0].weight is owner, "the parameter is the same object"
    assert torch.equal(two(x), expected)
    with torch.no_grad():
        model[1].running_mean += 1
    assert torch.equal(two[1].running_mean, model[1].running_mean)
    assert share_weights([model, one]) == [False, False], "they are one already"


def test_what_differs_stays_apart(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    other[2].weight.data = other[2].weight.data.t().contiguous().t()
    other[3].to(torch.bfloat16)
    values = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert share_weights([model, other]) == [False, True]
    for apart in (0, 2, 3):
        assert other[apart].weight.data_ptr() != model[apart].weight.data_ptr()
    assert other[1].weight.data_ptr() == model[1].weight.data_ptr()
    assert other[2].bias.data_ptr() == model[2].bias.data_ptr()
    assert all(torch.equal(tensor, values[name]) for name, tensor in other.state_dict().items())


def test_forms_share_the_layers_of_one_kind(model):
    forms = [Form(format="bf16"), Form(format="bf16", layers=(("0", "int8_weights"),))]
    forms += [Form(format="bf16", layers=(("0", "int8_weights"), ("2", "int8_weights")))]
    served = [Served(model, form, CPU) for form in forms]
    x = torch.randn(3, 256)
    expected = [one(x) for one in served]
    assert share_weights(served) == [False, True, True]
    assert served[2].model[0].q.data_ptr() == served[1].model[0].q.data_ptr()
    assert served[1].model[2].weight.data_ptr() == served[0].model[2].weight.data_ptr()
    assert all(torch.equal(one(x), before) for one, before in zip(served, expected, strict=True))
    assert held(*served) == held(served[0]) + 2 * (256 * 256 + 4 * 256), "beside it two layers in 8 bits, with scales"


def test_memory_of_layers_beside_each_other_is_not_kept_for_one_of_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(256, 512, bias=False), nn.Linear(256, 512, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Two()
    one = Served(model, Form(format="bf16", layers=(("a", "int8_weights"),)), CPU)
    both = Served(model, Form(format="bf16", linear="int8_weights"), CPU)
    x = torch.randn(3, 256)
    expected = both(x)
    bytes_of_a_layer = 512 * 256 + 4 * 512
    assert held(both) == 2 * bytes_of_a_layer
    third = Served(model, Form(format="bf16", linear="int8_weights"), CPU)
    assert share_weights([one, both, third]) == [False, True, True]
    assert both.model.a.q.data_ptr() == one.model.a.q.data_ptr()
    assert held(one, both) == held(one) + bytes_of_a_layer
    assert torch.equal(both(x), expected)
    assert held(one, both, third) == held(one, both)
