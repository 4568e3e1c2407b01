"""Each call runs in the form measured with its shapes, or the nearest."""

import math

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference import Form, Served, ServedByShape
from deepseek_mp.inference.by_shape import distance

CPU = torch.device("cpu")


@pytest.fixture
def model():
    layer = nn.Linear(4, 2)
    served = {"few": Served(layer, Form(), CPU), "many": Served(layer, Form(format="bf16"), CPU)}
    return ServedByShape(served, {"few": ((1, 4),), "many": ((64, 4),)})


@pytest.mark.parametrize(
    ("shape", "name"),
    [((1, 4), "few"), ((64, 4), "many"), ((7, 4), "few"), ((9, 4), "many"), ((1000, 4), "many"), ((0, 4), "few")],
)
def test_the_nearest_serves(model, shape, name):
    x = torch.randn(shape)
    assert model.name_for(x) == model.name_for(input=x) == name
    expected = model.forms[model.names.index(name)](x)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(input=x), expected)


def test_what_was_measured_itself_serves_itself():
    """A size of none is as near to one as to none."""
    layer = nn.Linear(4, 2)
    served = {"one": Served(layer, Form(), CPU), "none": Served(layer, Form(), CPU)}
    assert ServedByShape(served, {"one": ((1, 4),), "none": ((0, 4),)}).name_for(torch.randn(0, 4)) == "none"


def test_other_structures_are_compared_by_their_elements(model):
    assert model.name_for(torch.randn(4)) == "few"
    assert model.name_for(torch.randn(8, 8, 4)) == "many"
    assert model(torch.randn(8, 8, 4)).shape == (8, 8, 2)


def test_distances():
    assert distance(((2, 8), (3,)), ((2, 8), (3,))) == (False, 0.0)
    assert distance(((4, 8), (3,)), ((2, 16), (3,))) == (False, pytest.approx(2 * math.log(2)))
    assert distance(((8,),), ((2, 8),)) == (True, pytest.approx(math.log(2)))
    assert distance(((1000, 8), (3,)), ((1, 8), (3,))) < distance(((8,),), ((1, 8), (3,))), "structures come first"
    assert distance((), ((2,),)) == (True, pytest.approx(math.log(2)))


def test_it_is_for_inference(model):
    assert model.eval() is model
    with pytest.raises(ConfigError, match="served in 2 forms"):
        model.train()
