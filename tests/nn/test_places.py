"""A module under several names is one, and is replaced under all of them."""

from __future__ import annotations

from torch import nn

from deepseek_mp.nn.places import owners, places_of, replaced


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.block = nn.Sequential(nn.ReLU(), self.first)
        self.tied = nn.Linear(2, 2, bias=False)
        self.table = nn.Embedding(2, 2)
        self.tied.weight = self.table.weight
        self.empty = None


def test_it_is_replaced_in_every_place():
    model, made = Twice(), nn.Identity()
    assert places_of(model, "block.1") == [(model, "first"), (model.block, "1")]
    assert replaced(model, "first", made) is model
    assert model.first is made
    assert model.block[1] is made
    assert replaced(model, "", made) is made


def test_owners_are_modules_and_not_names():
    model = Twice()
    found = owners(model)
    assert found[id(model.first.weight)] == 1
    assert found[id(model.tied.weight)] == 2
